"""Every option composes and names all parameters of its constructor; a mistyped key gets the nearest name."""

from __future__ import annotations

import inspect
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from distill.cli.config import auto_values, compose, instantiate, override_checks
from distill.cli.main import main
from distill.cli.runs.assembly import build_losses, build_student, build_trainer
from distill.cli.runs.preflight import plan_losses, plan_run
from distill.cli.runs.teacher_cache import planned_teacher
from distill.detectors.options import to_plain
from distill.type_checks import leaves
from distill.types import DistillError
from helpers.detectors import FAMILIES
from helpers.grids import exhaustive, mostly_exhaustive
from helpers.methods import METHODS

# `base` is what the other options of its group inherit; it is not complete.
OPTIONS = [
    (group, option) for group, options in compose.config_groups().items() for option in options if option != "base"
]
GIVEN = {
    "classes",
    "student",
    "teacher",
    "ground_truth",
    "min_size",
    "max_size",
}  # handed over at run time, so no YAML needs to name them


def combined() -> list[dict[str, str]]:
    """Configurations, group -> option, which together have every option of every group but `experiment`.

    Options ``of/NAME`` are those that the configuration chooses by itself, here for every third model.
    """
    groups: dict[str, list[str]] = {}
    for group, option in OPTIONS:
        if group != "experiment" and not option.startswith("of/"):
            groups.setdefault(group, []).append(option)
    rows = range(max(map(len, groups.values())))
    chosen = [{group: options[row % len(options)] for group, options in groups.items()} for row in rows]
    return chosen + [{"model": option} for option in groups["model"][::3]]


ALONE = [{group: option} for group, option in OPTIONS]
"""Every option, with the default of every other group."""


def short_id(options: dict[str, str]) -> str:
    return " ".join(f"{group}={option}" for group, option in options.items() if len(options) == 1 or group == "model")


EXPERIMENTS = compose.config_groups()["experiment"]


@pytest.mark.parametrize("options", [*combined(), *map(exhaustive, ALONE)], ids=short_id)
def test_every_option_composes_and_names_all_parameters_of_our_constructors(options: dict[str, str]) -> None:
    cfg = compose.compose_config([*(f"{group}={option}" for group, option in options.items()), "paths.run=x"])
    assert cfg.data.source
    for group, option in options.items():
        if group in OURS:
            assert_names_every_parameter(cfg[group], f"{group}/{option}")


@pytest.mark.parametrize("wanted", [True, False])
def test_bars_may_be_switched_off_as_lightning_does(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = build_trainer(plan_run(override_checks.compose_without_run([f"trainer.enable_progress_bar={wanted}"])))
    assert (trainer.progress_bar_callback is not None) == wanted


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{path}.{key}")


OURS = ("data", "model", "distill", "schedule", "metrics", "callbacks")
"""Groups whose options name constructors of the package."""


def assert_names_every_parameter(options: DictConfig, where: str) -> None:
    found = [(path, node) for path, node in targets(options) if node._target_.startswith("distill.")]
    assert found or where == "distill/none"
    for path, node in found:
        parameters = inspect.signature(get_class(node._target_)).parameters
        assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)], path
        keys = {str(key) for key in node} - {"_target_", "_partial_"}
        assert keys <= set(parameters), f"{where}{path}"
        assert set(parameters) - keys <= GIVEN, f"{where}{path}"


def plain(value: Any) -> Any:
    """As YAML has it: mappings as dictionaries, sequences as lists."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("option", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_the_base_option_of_a_family_has_the_constructor_s_defaults(option: str) -> None:
    """At every depth: `backbone`, `anchors` and `pixels` too."""
    node = compose.compose_config([f"model={option}"]).model
    given = OmegaConf.to_container(node, resolve=True)
    parameters = inspect.signature(get_class(node._target_)).parameters
    defaults = {name: to_plain(each.default) for name, each in parameters.items() if name not in GIVEN}
    assert given == {"_target_": node._target_, **defaults}


def inherited(option: str) -> list[str]:
    """The options whose keys this option of ``distill`` takes and changes."""
    defaults = OmegaConf.load(compose.config_folder() / "distill" / f"{option}.yaml").get("defaults", [])
    return [line.removesuffix("@_here_") for line in defaults if line.endswith("@_here_")]


LOSSES = [option for group, option in OPTIONS if group == "distill" and option != "none"]
COMBINATIONS = ["best"]
"""Options that compose several methods."""
BASES = [option for option in LOSSES if not (inherited(option) or option in COMBINATIONS)]


@pytest.mark.parametrize("option", BASES)
def test_the_base_option_of_a_loss_has_the_constructor_s_defaults(option: str) -> None:
    """At every depth; `of`, what PAD wraps, has another option's keys."""
    cfg = compose.compose_config([f"distill={option}", "paths.run=x"]).distill
    assert list(cfg.losses) == [option]
    for path, node in targets(cfg):
        if path.endswith(".of"):
            continue
        given = OmegaConf.to_container(node, resolve=True)
        parameters = inspect.signature(get_class(node._target_)).parameters
        defaults = {
            name: plain(parameter.default)
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty and name not in {"seed", *GIVEN}
        }
        assert {name: given.get(name, "not a key") for name in defaults} == defaults, f"{option}{path}"
        assert OmegaConf.to_container(node).get("seed") == ("${seed}" if "seed" in parameters else None)


@pytest.mark.parametrize("option", [option for option in LOSSES if inherited(option)])
def test_an_option_that_inherits_says_only_what_it_changes(option: str) -> None:
    own = OmegaConf.to_container(OmegaConf.load(compose.config_folder() / "distill" / f"{option}.yaml"))
    own.pop("defaults")
    (base,) = inherited(option)
    ((_, node),) = compose.compose_config([f"distill={base}"]).distill.losses.items()
    before = dict(leaves(OmegaConf.to_container(node)))
    assert own
    for key, value in leaves(own):
        assert key in before
        assert value != before[key], key


@pytest.mark.parametrize("option", COMBINATIONS)
def test_an_option_that_combines_has_the_nodes_of_its_parts(option: str) -> None:
    """Each part is identical to its own option: the combination changes no key."""
    lines = OmegaConf.load(compose.config_folder() / "distill" / f"{option}.yaml").defaults
    parts = dict(line.split("@_global_.distill.losses.") for line in lines if "@_global_" in line)
    losses = compose.compose_config([f"distill={option}", "paths.run=x"]).distill.losses
    assert list(losses) == list(parts.values())
    for part, name in parts.items():
        assert losses[name] == compose.compose_config([f"distill={part}", "paths.run=x"]).distill.losses[name]


@pytest.mark.parametrize("option", ["none", "defeat", "dsig"])
def test_options_of_one_sweep_build_on_a_pair_of_unequal_necks(option: str) -> None:
    from distill.detectors.faster_rcnn import FasterRCNNView
    from distill.types import DetectorSpec

    student, teacher = (
        DetectorSpec(
            family="faster_rcnn",
            outputs=FasterRCNNView.outputs,
            classes=("cat", "dog"),
            body=dict.fromkeys((4, 8, 16, 32), channels),
            neck=dict.fromkeys((4, 8, 16, 32, 64), channels),
            anchors=dict.fromkeys((4, 8, 16, 32, 64), 3),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            norm="frozen",
        )
        for channels in (64, 256)
    )
    losses = build_losses(plan_losses(compose.compose_config([f"distill={option}"])), student, teacher)
    assert list(losses) == [name for name in ("defeat", "dsig") if name == option]
    assert all(loss.weights and list(loss.parameters()) for loss in losses.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("modle=frcnn_r50", "no group or key 'modle'; did you mean model"),
        ("model=frcnn_r5", "group 'model' has no option 'frcnn_r5'; did you mean model=frcnn_r50"),
        ("distill=[defeat,defet]", "group 'distill' has no option 'defet'; did you mean distill=defeat"),
        ("schedule.epoch=3", "no key 'schedule.epoch'; did you mean schedule.epochs"),
        (
            "schedule.optimizer.weight_decai=3",
            "no key 'schedule.optimizer.weight_decai'; did you mean schedule.optimizer.weight_decay",
        ),
        ("data.source.trian=3", "no key 'data.source.trian'; did you mean data.source.train"),
        ("sed=3", "no group or key 'sed'; did you mean seed"),
        ("model=[", "cannot read the command line"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(line: str, message: str) -> None:
    with pytest.raises(DistillError) as caught:
        override_checks.validate_overrides([line])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["seed=0,1,2", "distill=none,defeat"],
        ["schedule.optimizer.lr=interval(0.001,0.1)"],
        ["~callbacks.rate"],
        ["+data.extra=1"],
        ["distill=[none,defeat]"],
        ["model=glob(frcnn*)", "seed=range(0,3)"],
    ],
)
def test_what_hydra_allows_is_let_through(lines: list[str]) -> None:
    override_checks.validate_overrides(lines)


def kept(option: str) -> dict[str, Any]:
    """The losses of an option alone."""
    return dict(OmegaConf.to_container(compose.compose_config([f"distill={option}"]).distill.losses))


@pytest.mark.exhaustive
def test_any_two_distill_options_add_up_or_are_refused() -> None:
    """Those that write one loss are refused in pairs; of the others one from each method, all at once."""
    alone = {option: kept(option) for option in compose.config_groups()["distill"]}
    alike = [pair for pair in itertools.combinations(alone, 2) if alone[pair[0]].keys() & alone[pair[1]].keys()]
    assert {("mimic", "mimic_neck"), ("ssim", "ssim_l1"), ("pad_fgfi", "pad_fgfi_voc")} <= set(alike)
    assert not any(set(pair) == {"pad_fgfi", "pad_mimic"} or "none" in pair for pair in alike)
    for one, other in alike:
        with pytest.raises(DistillError, match=f"{one} and {other} both write the loss"):
            override_checks._refuse_shared_losses([f"distill=[{one},{other}]"])
    left = dict(alone)
    while left:
        together: dict[str, Any] = {}
        for option, losses in list(left.items()):
            if not losses.keys() & together.keys():
                together |= left.pop(option)
                together["options"] = [*together.get("options", ()), option]
        line = f"distill=[{','.join(together.pop('options'))}]"
        override_checks.validate_overrides([line])
        assert OmegaConf.to_container(compose.compose_config([line]).distill.losses) == together


def test_a_second_loss_of_one_method_takes_a_name_of_its_own(conf: Path) -> None:
    second = "+distill.losses.ssim_2={_target_: distill.SSIM, error: l1}"
    with pytest.raises(
        DistillError, match=r"ssim and ssim_l1 both write .* by '\+distill\.losses\.ssim_2=\{_target_: …\}'"
    ):
        override_checks.validate_overrides(["distill=[ssim,ssim_l1]"])
    override_checks.validate_overrides(["distill=ssim", second])
    losses = compose.compose_config(["distill=ssim", second]).distill.losses
    assert [losses[name].error for name in ("ssim", "ssim_2")] == ["ssim", "l1"]
    # as well where an experiment chooses
    text = "# @package _global_\ndefaults:\n  - override /distill: [defeat, defeat_voc]\n"
    (conf / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(DistillError, match="defeat and defeat_voc both write the loss 'defeat'"):
        override_checks.validate_overrides(["experiment=mine"])
    override_checks.validate_overrides(["experiment=mine", "distill=[defeat,dsig]"])


def test_every_value_of_a_swept_group_is_checked() -> None:
    with pytest.raises(DistillError, match="no option 'defet'"):
        override_checks.validate_overrides(["distill=none,defet"])


STUDENTS = {
    next(name for name in compose.config_groups()["model"] if name.startswith(f"{family.options}_")): family.detector
    for family in FAMILIES.values()
}
"""An option of each family -> its class. `test_distiller` compares the names of a class with its losses."""
PAIRS = list(itertools.permutations(STUDENTS, 2))


@pytest.mark.parametrize(
    ("student", "teacher"),
    mostly_exhaustive(PAIRS, zip(STUDENTS, [*list(STUDENTS)[1:], *list(STUDENTS)[:1]], strict=True)),
)
def test_supervised_names_the_losses_of_the_student_and_not_of_the_teacher(student: str, teacher: str) -> None:
    own, others = (
        set(compose.compose_config([f"supervised={STUDENTS[name].__name__}"]).supervised) for name in (student, teacher)
    )
    cfg = compose.compose_config([f"model={student}", f"teacher={teacher}"])
    assert own
    assert cfg.supervised == dict.fromkeys(own, 1.0)
    name, other = min(own), others - own
    assert compose.compose_config([f"model={student}", f"supervised.{name}=0"]).supervised[name] == 0
    for foreign in other:
        with pytest.raises(DistillError, match=f"there is no key 'supervised.{foreign}', which weights a loss of"):
            override_checks.validate_overrides([f"model={student}", f"teacher={teacher}", f"supervised.{foreign}=0"])


def test_a_detector_of_a_users_own_has_no_loss_names(new_conf: Path) -> None:
    (new_conf / "model" / "mine.yaml").write_text("_target_: torch.nn.Identity\n")
    assert compose.compose_config(["model=mine", "teacher=none", "distill=none"]).supervised == {}


def test_the_first_line_of_a_family_s_file_names_its_losses(new_conf: Path) -> None:
    models = new_conf / "model"
    (models / "mine.yaml").write_text("# @losses first,second\n_target_: torch.nn.Identity\n")
    (models / "mine_large.yaml").write_text("defaults: [mine]\n")
    (models / "heir.yaml").write_text("defaults: [mine]\n_target_: torch.nn.Sequential\n")
    (models / "other.yaml").write_text("defaults: [mine]\n_target_: distill.FCOS\n")
    names = {
        name: list(compose.compose_config([f"model={name}", "distill=none"]).supervised)
        for name in ("mine", "mine_large", "heir", "other")
    }
    own = ["first", "second"]
    fcos = ["classification", "bbox_regression", "bbox_ctrness"]
    assert names == {"mine": own, "mine_large": own, "heir": own, "other": fcos}
    for wrong in ("# @losses first\ndefaults: [mine]\n", "# @losses first, second\n_target_: torch.nn.Identity\n"):
        (models / "wrong.yaml").write_text(wrong)
        with pytest.raises(DistillError, match=r"wrong\.yaml: expected '# @losses NAME,NAME'"):
            compose.config_groups()


SWEEP = "distill=none,defeat,dsig"


@pytest.mark.parametrize(
    ("words", "forced"),
    [
        ([SWEEP, "distill.losses.dsig.neck.all=1"], ["distill.losses.dsig.neck.all=1"]),
        ([SWEEP, "distill.losses.dsig.neck.all=1,2", "seed=1,2"], ["distill.losses.dsig.neck.all=1,2"]),
        (["distill=dsig,[defeat,dsig]", "distill.losses.dsig.neck.all=1,2"], []),
        (["distill=dsig", "distill.losses.dsig.neck.all=1"], []),
        (["seed=1,2"], []),
    ],
)
def test_a_key_of_one_method_composes_in_the_sweep_s_other_jobs(words: list[str], forced: list[str]) -> None:
    assert override_checks.validate_overrides(words)[1] == [f"++{word}" if word in forced else word for word in words]
    key = "++distill.losses.dsig.neck.all=1"
    assert override_checks.applicable_overrides(["distill=none", key, "seed=3"]) == ["distill=none", "seed=3"]
    assert override_checks.applicable_overrides(["seed=3", key, "distill=[dsig,mimic]"]) == [
        "seed=3",
        key[2:],
        "distill=[dsig,mimic]",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [SWEEP, "distill.losses.dsig.neck.al=1"],
            "no key 'distill.losses.dsig.neck.al'; did you mean distill.losses.dsig.neck.all",
        ),
        ([SWEEP, "distill.losses.dsig.neck.all=1", "distill.losses.dsg.neck.all=1,2"], "no key 'distill.losses.dsg'"),
        (["seed=1,2", "distill=none", "distill.losses.dsig.neck.all=1"], "has the loss 'dsig': choose distill=dsig"),
        (["distill=defeat", "distill.losses.dsig.neck.all=1"], "has the loss 'dsig': choose distill=dsig"),
    ],
)  # fmt: skip
def test_a_key_that_applies_to_no_job_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(DistillError) as caught:
        override_checks.validate_overrides(words)
    assert message in str(caught.value)


def test_every_student_has_a_default_teacher_and_can_be_one() -> None:
    known = compose.config_groups()
    students = set(known["model"]) - {"base"}
    assert students == {name.removeprefix("of/") for name in known["teacher"] if name.startswith("of/")}
    assert students <= set(known["teacher"])


@pytest.fixture
def new_conf(conf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configuration, to be changed, of which no option is registered yet."""
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {**store.repo, "teacher": {}, "metrics": {}, "supervised": {}})
    return conf


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ([], "dsig"),
        (["model=frcnn_r50"], "dsig"),
        (["model=mask_rcnn_r50"], "dsig"),
        (["model=retinanet_r50"], "defeat"),
        (["model=fcos_r50"], "defeat"),
        (["model=frcnn_r50", "distill=defeat"], "defeat"),
    ],
)
def test_the_default_method_is_that_of_the_students_family(words: list[str], method: str) -> None:
    cfg = override_checks.compose_without_run(words)
    named = override_checks.compose_without_run([*words, f"distill={method}"])
    assert list(cfg.distill.losses) == [method]
    assert (cfg.distill, cfg.name) == (named.distill, named.name)
    assert not any(option.startswith("of/") for option in compose.config_groups()["distill"])


@pytest.mark.parametrize(
    "student", ["frcnn_r10_mini", "mask_rcnn_r10_mini", "retinanet_r10_quarter", "fcos_r10_quarter"]
)
def test_the_default_method_builds_for_a_student_and_its_default_teacher(student: str) -> None:
    plan = plan_run(override_checks.compose_without_run([f"model={student}", "data.masks=true"]))
    assert plan.teacher is not None
    detector = build_student(plan, plan.data)
    assert build_losses(plan.losses, detector.spec, planned_teacher(plan.teacher, plan.data.classes).spec)


@pytest.mark.parametrize("experiment", mostly_exhaustive(EXPERIMENTS, EXPERIMENTS[::6]))
def test_an_experiment_keeps_the_method_that_it_names(experiment: str) -> None:
    file = OmegaConf.load(compose.config_folder() / "experiment" / f"{experiment}.yaml")
    named = [line["override /distill"] for line in file.defaults if "override /distill" in line]
    if not named:  # inherited from the experiment of another detector
        return
    composed, chosen = (
        compose.compose_config([f"experiment={experiment}", *words, "paths.run=x", "name=x"])
        for words in ([], [f"distill={named[0]}"])
    )
    assert composed.distill == chosen.distill


def test_a_model_without_a_line_in_the_table_has_no_default_teacher_and_can_be_one(new_conf: Path) -> None:
    (new_conf / "model" / "mine.yaml").write_text("defaults: [frcnn_r18]\n")
    (new_conf / "data" / "mine.yaml").write_text("defaults: [shapes]\n")
    (new_conf / "schedule" / "of" / "mine.yaml").write_text("defaults: [/schedule/of/shapes@_here_]\n")
    cfg = compose.compose_config(["model=mine", "data=mine", "distill=none"])
    assert cfg.teacher == {}
    assert list(cfg.metrics) == ["coco"]
    assert compose.compose_config(["teacher=mine"]).teacher.model.backbone.depth == 18
    assert {"mine", "of/mine"} <= set(compose.config_groups()["teacher"])
    with pytest.raises(DistillError, match=r"cannot do without a teacher.* no default teacher.*: choose teacher=MODEL"):
        plan_run(override_checks.compose_without_run(["model=mine", "distill=mimic"]))
    (new_conf / "teachers.yaml").write_text("default: none\nmine: {teacher: fcos_r18, run: [seed=7]}\n")
    cfg = compose.compose_config(["model=mine"])
    assert (cfg.teacher.model._target_, list(cfg.teacher.run)) == ("distill.FCOS", ["seed=7"])


def test_a_file_of_a_users_own_takes_precedence_over_a_line(new_conf: Path) -> None:
    (new_conf / "teacher" / "of").mkdir()
    (new_conf / "teacher" / "of" / "fcos_r50.yaml").write_text("defaults: [/teacher/fcos_r34@_here_]\nseed: 9\n")
    cfg = compose.compose_config(["model=fcos_r50"])
    assert (cfg.teacher.model.backbone.depth, cfg.teacher.seed) == (34, 9)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "teachers.yaml",
            "default: none\nfrcnn_r50: frcnn_r11",
            "frcnn_r50: there is no option 'frcnn_r11'; did you mean frcnn_r10",
        ),
        (
            "teachers.yaml",
            "default: none\nfrcnn_r51: frcnn_r101",
            "there is no option 'frcnn_r51'; did you mean frcnn_r50",
        ),
        ("teachers.yaml", "frcnn_r50: frcnn_r101", "a line 'default'"),
        ("teachers.yaml", "[frcnn_r50]", "expected a mapping"),
        ("teachers.yaml", "frcnn_r50: [", "cannot be read"),
        ("metrics.yaml", "default: coco\nvoc: [coco, vok]", "voc: there is no option 'vok'; did you mean voc"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_table_names_the_line(file: str, text: str, message: str, new_conf: Path) -> None:
    (new_conf / file).write_text(text)
    with pytest.raises(DistillError) as caught:
        override_checks.validate_overrides([])
    assert f"{file}: " in str(caught.value)
    assert message in str(caught.value)


def test_help_and_completion_know_the_options_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out.replace(",\n  ", ", ")  # the lists are wrapped
    shown = {line.partition(": ")[0]: line.partition(": ")[2].split(", ") for line in text.splitlines()}
    assert {"none", "frcnn_r50", "retinanet_x101"} <= set(shown["teacher"])
    assert not [group for group in shown if "/" in group]  # such groups are chosen by the configuration itself
    words = [sys.executable, "-m", "distill", "train", "-sc", "query=bash"]
    for typed, completed in (("teacher=retinanet_r15", "teacher=retinanet_r152"), ("metrics/of=", "metrics/of=bccd")):
        line = f"train.py {typed}"
        env = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert completed in done.stdout.split(), done.stderr


@pytest.mark.parametrize("line", ["--help", "model=frcnn_r5"])
def test_help_and_mistakes_come_before_anything_heavy(line: str) -> None:
    heavy = "{'torch', 'lightning', 'torchvision'} & set(sys.modules) or 'light'"
    code = (
        f"import atexit, sys; atexit.register(lambda: print({heavy})); "
        "from distill.cli.main import main; main(['train', sys.argv[1]])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, line], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "light", done.stdout + done.stderr
    # the processor's time: a busy machine is no reason to fail
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


def test_import_is_light() -> None:
    code = (
        "import sys, distill; "
        "assert not {'torch', 'lightning', 'torchvision', 'hydra'} & set(sys.modules); dir(distill)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_py_is_the_verb_train() -> None:
    top = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, str(top / "train.py"), "--cfg", "job"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "_target_: lightning.Trainer" in done.stdout


DATA = [option for option in compose.config_groups()["data"] if option != "base"]


ON_OTHER_DATA = list(itertools.product(EXPERIMENTS, DATA))


@pytest.mark.parametrize(
    ("experiment", "data"), mostly_exhaustive(ON_OTHER_DATA, zip(EXPERIMENTS[::3], DATA, strict=False))
)
def test_an_experiment_takes_any_data(experiment: str, data: str) -> None:
    """Nothing of the experiment's own data set is left, and every source builds."""
    cfg = compose.compose_config([f"experiment={experiment}", f"data={data}", "paths.run=x"])
    alone = compose.compose_config([f"data={data}", "paths.run=x"])
    assert cfg.data.source == alone.data.source
    assert set(cfg.data) == set(alone.data)
    resolved = auto_values.resolve(cfg, auto_values.UNREAD, [f"data={data}"])[0].data
    if cfg.data.resize == "square" and OmegaConf.is_list(cfg.data.min_size):
        with pytest.raises(DistillError, match=r"data\.resize=square: all images of a batch need one size"):
            instantiate.build_node(resolved)
        return
    instantiate.build_node(resolved)
    assert all("_target_" in metric for metric in cfg.metrics.values())


def body(experiment: str) -> Any:
    """What an experiment's file says beside its options, on top of the experiment that it inherits."""
    own = OmegaConf.load(compose.config_folder() / "experiment" / f"{experiment}.yaml")
    inherited = [body(str(line)) for line in own.pop("defaults") if isinstance(line, str) and line in EXPERIMENTS]
    return OmegaConf.merge(*inherited, own)


CHANGED = [name for name in EXPERIMENTS if "model" in body(name)]
"""Experiments that change options of their models."""


@pytest.mark.parametrize("experiment", mostly_exhaustive(CHANGED, CHANGED[::4]))
def test_an_experiment_says_of_its_teacher_what_it_says_of_its_student(experiment: str) -> None:
    """What differs from the plain model option is said of ``teacher.model`` itself, so that it is seen and used."""
    lines = [f"experiment={experiment}", "paths.run=x"]
    said = body(experiment)
    cfg = compose.compose_config(lines)
    of_teacher = dict(leaves(OmegaConf.to_container(said.teacher.model)))
    assert set(of_teacher) >= set(dict(leaves(OmegaConf.to_container(said.model))))
    composed = dict(leaves(OmegaConf.to_container(cfg.teacher.model)))
    assert {key: composed[key] for key in of_teacher} == of_teacher


def test_the_table_of_methods_has_every_loss_of_an_option() -> None:
    options = [OmegaConf.load(file) for file in (compose.config_folder() / "distill").glob("*.yaml")]
    targets = {option["_target_"].rpartition(".")[2] for option in options if "_target_" in option}
    assert targets == {method.loss.__name__ for method in METHODS.values()}
