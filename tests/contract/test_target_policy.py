"""A configuration from outside runs nothing: neither when it is composed, nor when Hydra acts, nor when it is built."""

from __future__ import annotations

from pathlib import Path

import hydra.utils
import pytest
from omegaconf import OmegaConf

from distill.cli.config import compose, config_folders, instantiate, override_checks, target_policy
from distill.run_folder import RunFolder
from distill.types import DistillError
from helpers.runs import TINY, Cli

CALL = "{_target_: os.mkdir, path: mark}"
"""A deed that Hydra's own list of bad names lets pass, and that leaves a mark."""


@pytest.fixture(autouse=True)
def _forget() -> None:
    target_policy.set_trusted([])


def outside(conf: Path, body: str) -> str:
    """An experiment file from somebody else; the override that chooses it."""
    (conf / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{body}\n")
    return "experiment=evil"


def test_the_deed_is_one_that_hydra_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hydra.utils.instantiate(OmegaConf.create(CALL))
    assert (tmp_path / "mark").is_dir()


HYDRA_NODE = {
    "callback": f"hydra: {{callbacks: {{x: {CALL}}}}}",
    "handler": "hydra: {job_logging: {version: 1, handlers: {x: {(): os.mkdir, path: mark}}, root: {handlers: [x]}}}",
    "hydra's handler": (
        "hydra: {hydra_logging: {version: 1, handlers: {x: {(): os.mkdir, path: mark}}, root: {handlers: [x]}}}"
    ),
    "log file": (
        "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.FileHandler, filename: mark}}, "
        "root: {handlers: [x]}}}"
    ),
    "environment": "hydra: {job: {env_set: {PYTHONPATH: /evil}}}",
    "folder": "hydra: {job: {chdir: true}}",
    "launcher": f"hydra: {{launcher: {CALL}}}",
    "sweeper": f"hydra: {{mode: MULTIRUN, sweeper: {CALL}}}",
    "part of a sweeper": f"hydra: {{mode: MULTIRUN, sweeper: {{+x: {CALL}}}}}",
    "interpolated": "hydra: {callbacks: {x: \"${oc.create:'{_target_: os.mkdir, path: mark}'}\"}}",
    "interpolated sweeper": (
        "hydra: {mode: MULTIRUN, sweeper: {params: \"${oc.create:'{_target_: os.mkdir, path: mark}'}\"}}"
    ),
    "jobs' hydra": "hydra: {mode: MULTIRUN, sweeper: {params: {hydra.job.env_set.PATH: x}}}",
    "jobs' added hydra": "hydra: {mode: MULTIRUN, sweeper: {params: {++hydra.job.env_set.PATH: x}}}",
    "jobs' trust": f"data: {{source: {CALL}}}\nhydra: {{mode: MULTIRUN, sweeper: {{params: {{trust: '[os]'}}}}}}",
    "noted overrides": "hydra: {overrides: {hydra: [hydra.job.chdir=true]}}",
    "noted task": "hydra: {overrides: {task: ['seed=1']}}",
    "package": "hydra: {sweeper: {_target_: hydra_plugins_evil.Sweeper}}",
}


@pytest.mark.parametrize("flags", [[], ["--cfg", "job"], ["--help"]], ids=["run", "cfg", "help"])
@pytest.mark.parametrize("attack", [pytest.param(body, id=name) for name, body in HYDRA_NODE.items()])
def test_what_a_file_says_to_hydra_is_refused_before_hydra_acts(
    attack: str, flags: list[str], conf: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags and "callbacks" not in attack:
        pytest.skip("one attack is enough to see that the flags do not bypass the policy")
    assert cli(["train", *flags, outside(conf, attack), *TINY, "distill=none"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("\ndistill: ")
    assert "hydra" in said or "trust" in said or "source" in said
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "outputs").exists()


def test_an_option_of_hydras_own_groups_from_outside_is_refused(conf: Path) -> None:
    (conf / "hydra" / "env").mkdir(parents=True)
    (conf / "hydra" / "env" / "evil.yaml").write_text("# @package hydra.job\nenv_set: {PYTHONPATH: /evil}\n")
    with pytest.raises(DistillError, match=r"hydra\.job\.env_set.PYTHONPATH"):
        override_checks.validate_overrides([outside(conf, "defaults: [{override /hydra/env: evil}]")])


@pytest.mark.parametrize("name", ["metrics/of/shapes", "supervised/FasterRCNN"])
def test_a_run_s_copy_of_options_cannot_become_a_part_of_the_default_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default configuration decides what Hydra may do. It reads derived options, too, which have no file."""
    monkeypatch.setattr(config_folders, "_given", ())
    file = tmp_path / "conf" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package hydra.job\nenv_set: {PYTHONPATH: /evil}\n")
    (tmp_path / "conf" / "distill").mkdir()
    (tmp_path / "conf" / "distill" / "mine.yaml").write_text("{}")
    words = config_folders.with_copy_of_run(["distill=none"], RunFolder(tmp_path))
    with pytest.raises(DistillError, match=rf"{name}\.yaml: distill has an option of this name"):
        override_checks.validate_overrides(words)


@pytest.mark.parametrize("line", ["hydra.callbacks.x", "+hydra.callbacks.x", "hydra.sweeper", "hydra.launcher"])
def test_the_command_line_too_needs_trust(
    line: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", f"{line}={CALL.replace(' path', 'path')}", *TINY, "distill=none"]) == 1
    assert "distill: " in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_every_job_of_a_sweep_is_checked_before_hydra_acts_on_it(conf: Path) -> None:
    """First, the file's own sweep chooses a second file. Then one combination of options alone chooses a third one."""
    (conf / "start" / "second.yaml").write_text("# @package hydra.job\nenv_set: {PYTHONPATH: /evil}\n")
    sweep = "hydra: {mode: MULTIRUN, sweeper: {params: {start: 'scratch,second'}}}"
    with pytest.raises(DistillError, match=r"hydra\.job\.env_set.PYTHONPATH"):
        override_checks.validate_overrides([outside(conf, sweep)])
    (conf / "hydra" / "env").mkdir(parents=True)
    (conf / "hydra" / "env" / "shapes-none.yaml").write_text("# @package hydra.job\nenv_set: {PYTHONPATH: /evil}\n")
    for name in ("shapes-defeat", "voc-none", "voc-defeat"):
        (conf / "hydra" / "env" / f"{name}.yaml").write_text("{}")
    words = [outside(conf, "defaults: [{override /hydra/env: '${data}-${distill}'}]"), "data=voc,shapes"]
    override_checks.validate_overrides([*words, "distill=defeat"])
    with pytest.raises(DistillError, match=r"hydra\.job\.env_set.PYTHONPATH"):
        override_checks.validate_overrides([*words, "distill=defeat,none"])


def test_a_file_may_name_folders_and_sweeps(conf: Path) -> None:
    body = "hydra: {run: {dir: here}, sweep: {dir: there}, mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}"
    cfg = compose.compose_with_hydra([outside(conf, body)])
    assert (cfg.hydra.run.dir, cfg.hydra.sweep.dir, cfg.hydra.sweeper.params.seed) == ("here", "there", "1,2")


@pytest.mark.usefixtures("conf")
def test_the_command_line_may_say_of_hydra_what_it_likes() -> None:
    words = ["hydra/job_logging=default", "hydra.job.chdir=true", "hydra.verbose=true"]
    cfg = compose.compose_with_hydra(words)
    assert cfg.hydra.job.chdir
    assert cfg.hydra.job_logging.handlers


@pytest.mark.parametrize(
    "body",
    [
        f"data: {{source: {CALL}}}",
        f"model: {CALL}",
        f"callbacks: {{x: {CALL}}}",
        f"distill: {{losses: {{x: {{_target_: distill.Mimic, parts: [{{deep: [{CALL}]}}]}}}}}}",
        f"teacher: {{model: {CALL}}}",
        f"trainer: {{strategy: {CALL}}}",
        f"anything: {{at: [{{all: {CALL}}}]}}",
        "data: {source: {_target_: '${oc.decode:os.mkdir}', path: mark}}",
        f"trust: [os.mkdir]\ndata: {{source: {CALL}}}",
        "trust: os",
    ],
)
def test_no_target_outside_of_the_known_packages_composes(body: str, conf: Path) -> None:
    with pytest.raises(DistillError, match="trust"):
        override_checks.validate_overrides([outside(conf, body)])


@pytest.mark.parametrize(
    "source",
    [
        "${oc.create:'{_target_: os.mkdir, path: mark}'}",
        "${oc.decode:'{_target_: os.mkdir, path: mark}'}",
        "${other}",
        "{_target_: distill.Shapes, classes: \"${oc.create:'{_target_: os.mkdir, path: mark}'}\"}",
        "{_target_: distill.Shapes, classes: '\\${oc.create:''{_target_: os.mkdir, path: mark}''}'}",
    ],
)
def test_no_text_becomes_a_call(source: str, conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quoted = source if source.startswith("{") else '"' + source + '"'
    line = outside(conf, f"other: \"${{oc.create:'{CALL}'}}\"\ndata: {{source: {quoted}}}")
    with pytest.raises(DistillError):
        instantiate.build_node(compose.compose_config([line]).data)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.os.system",
        "torch.os.mkdir",
        "torch.nn.modules.module.os.mkdir",
        "lightning.pytorch.trainer.trainer.os.mkdir",
        "distill.files.os.mkdir",
        "distill.detectors.weights.Path",
        "distill.data.records.Image.open",
        "distill.files.write_text",
        "distill.detectors.student_files.save_student",
        "distill.cli.main",
        "distill.cli.runs.sweep.SweepTable",
        "distill.cli.runs.child_runs.subprocess.Popen",
        "distill.detectors.backbones.torch.hub.load",
        "torch.hub.load",
        "torch.load",
        "torch.serialization.load",
        "torch.jit.load",
        "torch.from_file",
        "torch.ops.load_library",
        "torch.classes.load_library",
        "torch.utils.cpp_extension.load_inline",
        "torch.utils.cpp_extension.BuildExtension",
        "torch.cuda.CUDAPluggableAllocator",
        "torch.cuda.memory.CUDAPluggableAllocator",
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        "torch.package.PackageImporter",
        "torch.nn.Module.__init__.__globals__",
        "torch._C.PyTorchFileWriter",
        "torch.storage.TypedStorage.from_file",
        "torchvision.datasets.CIFAR10",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.LightningModule.load_from_checkpoint",
        "torchmetrics.functional.accuracy",
        "torch",
        "torch.float32",
        "torchattack.Model",
        "distill.",
        ".os.mkdir",
        "",
    ],
)
def test_no_name_leads_out_of_the_packages(name: str) -> None:
    node = OmegaConf.create({"_target_": name})
    with pytest.raises(DistillError):
        instantiate.build_node(node)
    with pytest.raises(DistillError):
        instantiate.load_target(node)


@pytest.mark.parametrize("name", [7, ["os.system"], {"a": 1}, None])
def test_a_target_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(DistillError, match=r"dotted name|names a class"):
        instantiate.build_node(OmegaConf.create({"_target_": name}))


@pytest.mark.parametrize("name", ["lightning.Trainer", "torch.optim.SGD", "distill.Shapes", "torchmetrics.Accuracy"])
def test_classes_of_the_packages_are_let_in(name: str) -> None:
    assert isinstance(instantiate.load_target(OmegaConf.create({"_target_": name})), type)


def test_own_transforms_are_named_on_the_command_line() -> None:
    gray = "{_target_: torchvision.transforms.v2.RandomGrayscale, p: 0.25}"
    nested = f"{{_target_: torchvision.transforms.v2.RandomApply, p: 0.5, transforms: [{gray}]}}"
    cfg = compose.compose_config(["data=shapes", f"data.transforms=[{gray},{nested}]", "data.augment.mosaic=0.5"])
    transform = instantiate.build_node(cfg.data).train_transform
    first, second = transform.transforms
    assert (first.p, second.p, second.transforms[0].p) == (0.25, 0.5, 0.25)
    assert transform.augment.mosaic == 0.5
    with pytest.raises(DistillError, match="may not name this"):
        instantiate.build_node(OmegaConf.merge(cfg.data, {"transforms": [{"_target_": "os.system"}]}))


def test_trust_is_the_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conf: Path) -> None:
    monkeypatch.chdir(tmp_path)
    line = outside(conf, f"anything: {CALL}")
    target_policy.set_trusted([line, "trust=[os.mkdir]"])
    override_checks.validate_overrides([line, "trust=[os.mkdir]"])
    instantiate.build_node(compose.compose_config([line]).anything)
    assert (tmp_path / "mark").is_dir()
    target_policy.set_trusted([line])
    with pytest.raises(DistillError, match="trust"):
        override_checks.validate_overrides([line])


def test_trust_of_a_package_covers_what_it_defines_and_not_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_package.py").write_text("import os\nfrom os import mkdir\n\n\ndef make(path):\n    return path\n")
    monkeypatch.syspath_prepend(tmp_path)
    target_policy.set_trusted(["trust=[my_package]"])
    assert instantiate.build_node(OmegaConf.create({"_target_": "my_package.make", "path": "x"})) == "x"
    for name in ("my_package.mkdir", "my_package.os.mkdir"):
        with pytest.raises(DistillError):
            instantiate.build_node(OmegaConf.create({"_target_": name, "path": str(tmp_path / "mark")}))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("word", ["trust=[os system]", "trust=[[a]]", "trust=7", "trust=", "trust=[", "trust={a: b}"])
def test_trust_names_packages(word: str, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", word]) == 1
    assert "trust=" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config-path", "-cn", "-cp", "--experimental-rerun"])
def test_hydras_flags_for_another_configuration_are_refused(
    flag: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", flag, str(tmp_path)]) == 1
    assert "experiment=mine" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["trust=[os]", "hydra.job.env_set.PATH=x", "+trust=[os]", "hydra/job_logging=default"])
def test_what_the_teachers_run_is_told_stays_within_bounds(
    word: str, conf: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    line = outside(conf, f"teacher: {{run: ['{word}']}}")
    assert cli(["train", line, *TINY, "distill=mimic"]) == 1
    assert "teacher.run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- data.source._target_=os.mkdir\n- trust=[os]\n", "trust"),
        ("- '+anything={_target_: os.mkdir,path: mark}'\n", "trust"),
        ("!!python/object/apply:os.mkdir [mark]\n", "cannot be read"),
        ("a: 1\n", "expected a list"),
        ("- 7\n", "expected a list"),
        ("- ['\n", "cannot be read"),
        ("\x00", "cannot be read"),
        ("- 'a['\n", "cannot read"),
    ],
)
def test_the_overrides_of_a_run_from_outside_are_judged(
    text: str, message: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "overrides.yaml").write_text(text)
    assert cli(["evaluate", "run"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "body", [f"l: {'[' * 100_000}{']' * 100_000}", f"l:\n {'- ' * 3000}x"], ids=["lists", "blocks"]
)
def test_a_file_that_is_nested_too_deeply_is_refused_in_one_line(body: str, conf: Path) -> None:
    with pytest.raises(DistillError) as caught:
        override_checks.validate_overrides([outside(conf, f"{body}\nseed: 7")])
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("words", [["evaluate", "run"], ["train", "distill=none", "name=x", "ckpt_path=last"]])
@pytest.mark.parametrize(
    "text",
    [
        f"- {'[' * 100_000}",
        f"- 'seed={'[' * 2000}{']' * 2000}'",
        "- 'l0=x'\n- +a='${l1}'\n- ++l=[\n",
    ],
    ids=["deep", "a deep word", "no words"],
)
def test_a_run_from_outside_that_cannot_be_read_is_named(
    words: list[str], text: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / ("run" if words[0] == "evaluate" else "outputs/x/1")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "overrides.yaml").write_text(text)
    assert cli(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("\ndistill: ")
    assert len(said) < 10_000


def test_only_known_words_are_computed() -> None:
    compose.compose_config([])
    known = {"now", "hydra", "python_version", "names", "sweep", "configuration", "pair", "resize_of"}
    theirs = {"env", "create", "decode", "deprecated", "select", "dict.keys", "dict.values"}
    assert set(type(OmegaConf.create())._resolvers) == known | {f"oc.{name}" for name in theirs}
