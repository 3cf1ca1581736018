"""Methods and detectors of the user: in a folder, with ``--config-dir`` and ``trust``, or in an installed package."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hatchling.build import build_wheel

import distill
from distill.cli.config import compose, config_folders, options, override_checks, target_policy
from distill.cli.runs import preflight, teacher_cache
from distill.types import DistillError
from helpers.image_folders import drawn
from helpers.runs import TINY, TINY_RUN, Cli, summary

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_method"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Neither folders nor trust nor modules of one test reach another one."""
    before, path = set(sys.modules), list(sys.path)
    yield
    config_folders.set_config_dirs([])
    target_policy.set_trusted([])
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("my_method", "my_detector", "evil"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on no path, into which the example package is installed."""
    out, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLE)
        wheel = build_wheel(str(out))
    with zipfile.ZipFile(out / wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    return site


def test_an_installed_method_trains_evaluates_and_resumes(
    site: Path,
    tiny_teacher: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is chosen like one of distill's own. Without the package, the run is refused, and nothing is imported."""
    with monkeypatch.context() as installed:
        installed.syspath_prepend(str(site))
        lines = [*TINY, "distill=my_loss", "distill.losses.my_loss.weight=2", f"teacher.weights={tiny_teacher}"]
        assert cli(["train", *lines, "hydra.run.dir=run"]) == 0
        assert "term/my_loss/neck.all" in summary(tmp_path / "run")["terms"]
        option = "distill/my_loss.yaml"
        assert (tmp_path / "run" / "conf" / option).read_text() == (site / "my_method" / "conf" / option).read_text()
        assert [file.name for file in (tmp_path / "run" / "conf").rglob("*.yaml")] == ["my_loss.yaml"]
        assert cli(["evaluate", "run"]) == 0
        assert cli(["resume", "run", "schedule.epochs=2", "trainer.max_steps=3", "resume=anyway"]) == 0
        assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
        assert cli(["train", "distill=my_los"]) == 1
        assert "did you mean distill=my_loss" in capsys.readouterr().err
    sys.modules.pop("my_method"), sys.modules.pop("my_method.my_loss")
    assert cli(["evaluate", "run"]) == 1
    assert "trust=[my_method.MyLoss]" in capsys.readouterr().err
    assert "my_method" not in sys.modules
    # Not installed, but named on this command line and lying in the current folder:
    shutil.copytree(EXAMPLE / "my_method", tmp_path / "my_method")
    assert cli(["evaluate", "run", "trust=[my_method]"]) == 0


def test_the_test_of_the_example_passes(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    spec = importlib.util.spec_from_file_location("test_my_loss", EXAMPLE / "test_my_loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_help_and_completion_know_the_options_of_a_package_and_of_a_folder(
    site: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(site))
    write(tmp_path / "mine" / "experiment" / "own_plan.yaml", "# @package _global_\nseed: 7\n")
    with pytest.raises(SystemExit):
        cli(["train", "--help", "--config-dir", "mine"])
    shown = capsys.readouterr().out
    assert "my_loss" in shown
    assert "own_plan" in shown
    for line, answer in (
        ("distill=my_", "distill=my_loss"),
        ("--config-dir mine experiment=own", "experiment=own_plan"),
    ):
        monkeypatch.setenv("COMP_LINE", f"distill train {line}")
        assert cli(["-sc", "query=bash"]) == 0
        assert answer in capsys.readouterr().out.split()
    assert "my_method" not in sys.modules


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


LOSS = "# @package distill.losses.mimic\ndefaults: [mimic]\nregions: {all: 0.0}\nneck: {all: 1.0}\n"
"""An option that needs no code of the user: a variant of Mimic."""


def test_a_folder_and_trust_reach_the_run_of_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are copied, too: with other options, a resume would look for another teacher in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    write(tmp_path / "mine.py", "from distill import FCOS\n\n\nclass Own(FCOS):\n    pass\n")
    write(tmp_path / "my conf" / "model" / "own_teacher.yaml", "defaults: [fcos_r10_quarter]\n_target_: mine.Own\n")
    write(tmp_path / "my conf" / "supervised" / "Own.yaml", "defaults: [FCOS]\n")
    given = ["--config-dir", "my conf", "trust=[mine]", "distill=mimic_neck", "model=fcos_r18", "teacher=own_teacher"]
    words = config_folders.expand_config_dirs(given)
    config_folders.set_config_dirs(words)
    target_policy.set_trusted(words)
    teacher = preflight.plan_teacher(override_checks.compose_without_run(words))
    assert teacher is not None
    overrides = teacher_cache.teacher_overrides(teacher)
    assert f'config_dirs=["{tmp_path / "my conf"}"]' in overrides
    assert "trust=[mine]" in overrides
    assert list(compose.own_files(words)) == ["model/own_teacher.yaml"]
    assert set(compose.own_files(overrides)) == {"model/own_teacher.yaml", "supervised/Own.yaml"}


@pytest.mark.exhaustive
def test_a_folder_reaches_every_process_of_a_sweep(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its jobs, and the run that trains the teacher, which has an option of the folder, too."""
    write(tmp_path / "my conf" / "distill" / "own_neck.yaml", LOSS)
    write(tmp_path / "my conf" / "model" / "own_teacher.yaml", "defaults: [frcnn_r18_mini]\n")
    small = [f"teacher.{word}" for word in TINY if word.startswith("model.")]
    taught = [*small, f"teacher.run={json.dumps(TINY_RUN)}", "teacher.min_ap=null"]
    words = ["distill=own_neck", "teacher=own_teacher", *taught, *TINY]
    assert cli(["train", "-m", "--config-dir", "my conf", *words, "hydra.sweep.dir=sweep"]) == 0
    job = tmp_path / "sweep" / "0"
    assert "term/mimic/neck.all" in summary(job)["terms"]
    copies = {file.relative_to(job / "conf").as_posix() for file in (job / "conf").rglob("*.yaml")}
    assert copies == {"distill/own_neck.yaml", "model/own_teacher.yaml"}
    (teacher,) = (tmp_path / "outputs" / "teachers").glob("own_teacher-*/conf/model/own_teacher.yaml")
    assert teacher.is_file()
    # The run is composed from its copy, wherever the folder is now.
    shutil.move(tmp_path / "my conf", tmp_path / "moved")
    assert cli(["evaluate", str(job)]) == 0
    capsys.readouterr()
    assert cli(["resume", str(job), "trainer.max_steps=2", "resume=anyway"]) == 0  # the teacher is found in the cache
    assert "no teacher is cached" not in capsys.readouterr().out


# -- a detector family


DETECTOR = '''
from distill.detectors.fcos import FCOS, FCOSView


class OwnView(FCOSView):
    """FCOS's View."""


class OwnFCOS(FCOS):
    family = "own_fcos"
    view_class = OwnView
'''
LOSSES = "# @losses classification,bbox_regression,bbox_ctrness\n"
MODEL = f"{LOSSES}defaults: [fcos_r10_quarter]\n_target_: my_detector.OwnFCOS\nneck_channels: 64\n"
FAMILY = [
    "model=own_fcos",
    "distill=none",
    "supervised.bbox_ctrness=3.0",
    *(word for word in TINY if not word.startswith("model.")),
]


@pytest.fixture
def family(tmp_path: Path) -> None:
    """A family in a module in the current folder, and its option in a folder beside it."""
    write(tmp_path / "my_detector.py", DETECTOR)
    write(tmp_path / "mine" / "model" / "own_fcos.yaml", MODEL)


@pytest.mark.usefixtures("family")
def test_an_own_family_is_trained_evaluated_predicted_and_loaded(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = ["--config-dir", "mine", "trust=[my_detector]"]
    assert cli(["train", "model=own_fcos", "distill=mimic_neck", *trust]) == 1
    assert "has no default teacher for this student" in capsys.readouterr().err
    assert cli(["train", *FAMILY, "hydra.run.dir=run", *trust]) == 0
    run = tmp_path / "run"
    assert json.loads((run / "student.json").read_text())["model"]["family"] == "my_detector.OwnFCOS"
    assert "student/bbox_ctrness" in str(summary(run)["terms"])
    assert yaml.safe_load((run / "config.yaml").read_text())["supervised"]["bbox_ctrness"] == 3.0
    drawn("val", 1)[1][0][1].save(tmp_path / "a.png")
    assert cli(["evaluate", "run", "trust=[my_detector]"]) == 0
    assert cli(["predict", "run", "a.png", "trust=[my_detector]"]) == 0
    taught = ["teacher.weights=run", "distill=mimic_neck", "model=fcos_r10_quarter", "hydra.run.dir=taught"]
    assert cli(["train", *FAMILY[2:], *taught, *trust]) == 0
    # The class is imported now, so Python needs no more; neither file nor command line makes a new process import it.
    assert type(distill.load_detector(run)).__name__ == "OwnFCOS"
    assert len(distill.predict(run, [tmp_path / "a.png"])) == 1
    assert distill.Distiller.load_from_checkpoint(run / "checkpoints" / "last.ckpt").student.spec.family == "own_fcos"


@pytest.mark.parametrize("verb", [["evaluate", "run"], ["predict", "run", "a.png"], ["train", *TINY, "distill=mimic"]])
def test_a_file_cannot_import_the_class_of_a_detector(
    verb: list[str], tiny_teacher: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "run"))
    rename_family(run, "evil.Detector")
    write(tmp_path / "evil.py", "import os\nos.mkdir('mark')\n")
    write(tmp_path / "evil-1.dist-info" / "METADATA", "Name: evil\nVersion: 1\n")  # a folder does not install itself
    write(tmp_path / "evil-1.dist-info" / "entry_points.txt", "[distill.plugins]\nevil = evil\n")
    drawn("val", 1)[1][0][1].save(tmp_path / "a.png")
    sys.path.insert(0, str(tmp_path))
    assert cli([*verb, *(["teacher.weights=run"] if verb[0] == "train" else [])]) == 1
    said = capsys.readouterr().err
    assert "evil.Detector, which is not part of distill" in said
    assert "trust=[evil]" in said
    assert not (tmp_path / "mark").exists()


def rename_family(run: Path, name: str) -> None:
    content = json.loads((run / "student.json").read_text())
    content["model"]["family"] = name
    (run / "student.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["my_detector.os", "my_detector.OwnView", "my_detector.Missing"])
@pytest.mark.usefixtures("family")
def test_a_trusted_name_that_is_no_detector_is_refused(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "run"))
    rename_family(run, name)
    sys.path.append(str(tmp_path))
    target_policy.set_trusted(["trust=[my_detector]"])
    with pytest.raises(DistillError, match="my_detector"):
        distill.load_detector(run)


def test_distills_own_modules_are_no_families(tiny_teacher: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "run"))
    rename_family(run, "distill.detectors.pyramid.DenseDetector")
    with pytest.raises(DistillError):
        distill.load_detector(run)


# -- folders of options


def test_options_of_a_package_are_presets_in_python(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    assert "my_loss" in compose.config_groups()["distill"]
    assert compose.compose_config(["distill=my_loss"]).distill.losses.my_loss.weight == 1.0
    with pytest.raises(DistillError, match="no option 'my_model'"):
        options.model("my_model", ["a"])


@pytest.mark.parametrize(
    "flag",
    [
        *("--config-dir mine", "--config-dir=mine", "-cd mine", "config_dirs=[mine]"),
        *("hydra.searchpath=[mine]", "+hydra.searchpath=[file://mine]"),
    ],
)
def test_a_folder_is_named_in_any_way(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine" / "data" / "own.yaml", "defaults: [shapes]\nmin_size: 96\n")
    words = config_folders.expand_config_dirs([*flag.split(), "data=own"])
    config_folders.set_config_dirs(words)
    cfg = compose.compose_config(words)
    assert list(cfg.config_dirs) == [str(tmp_path / "mine")]
    assert cfg.data.min_size == 96
    assert cfg.schedule.epochs == "auto"  # as for all own data
    assert list(cfg.metrics) == ["coco"]


FOLDERS = {
    "missing": (None, "there is no such folder"),
    "empty": ("notes.txt", "such as distill/my_loss.yaml"),
    "hydra": ("hydra/env/evil.yaml", "options of Hydra"),
    "hidden": ("distill/defeat.yaml", "distill has an option of this name"),
}


@pytest.mark.parametrize(("file", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_work_is_refused(
    file: str | None, message: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file is not None:
        write(tmp_path / "mine" / "distill" / "x.yaml" if file.startswith("hydra") else tmp_path / "mine" / file, "{}")
        write(tmp_path / "mine" / file, "{}")
    for verb in (["train"], ["doctor"], ["evaluate", "run"]):
        assert cli([*verb, "--config-dir", "mine"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--config-dir"], ["hydra.searchpath=[pkg://evil]"], ["config_dirs=[]", "-cd="]])
def test_a_value_that_is_no_folder_is_refused(words: list[str], cli: Cli, tmp_path: Path) -> None:
    write(tmp_path / "evil" / "__init__.py", "raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    assert cli(["train", *words]) == 1


# -- files from outside


EVIL = "# @package _global_\ndata: {source: {_target_: evil.Source}}\n"


@pytest.mark.parametrize("verb", ["evaluate", "resume"])
@pytest.mark.parametrize(
    ("file", "text", "overrides", "message"),
    [
        ("experiment/evil.yaml", EVIL, ["experiment=evil", "trust=[evil]"], "trust=[evil.Source]"),
        ("experiment/evil.yaml", f"{EVIL}trust: [evil]\n", ["experiment=evil"], "trust"),
        ("experiment/evil.yaml", f"{EVIL}config_dirs: [elsewhere]\n", ["experiment=evil"], "trust"),
        ("data/evil.yaml", "_target_: evil.Data\n", ["data=evil"], "trust=[evil.Data]"),
        ("model/evil.yaml", "defaults: [evil]\n_target_: evil.Model\n", ["model=evil"], "inherits from itself"),
        ("model/evil.yaml", "[" * 100_000, [], "evil.yaml"),
        ("hydra/env/evil.yaml", "# @package hydra.job\nenv_set: {PYTHONPATH: /evil}\n", [], "options of Hydra"),
        ("distill/mine.yaml", LOSS, ["config_dirs=[elsewhere]", "distill=other"], "no option 'other'"),
        ("start/evil.yaml", "# @package hydra\nsearchpath: [elsewhere]\n", ["start=evil"], "searchpath"),
        ("distill/defeat.yaml", "# @package distill.losses.x\n_target_: evil.Loss\n", ["distill=other"], "'other'"),
    ],
    ids=["recorded", "trust", "folders", "data", "loop", "nested", "hydra", "elsewhere", "searchpath", "shadow"],
)
def test_the_recorded_options_of_a_run_import_nothing(
    verb: str,
    file: str,
    text: str,
    overrides: list[str],
    message: str,
    tiny_teacher: Path,
    cli: Cli,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run folder from somebody else, with options, with recorded words, and with a module beside it."""
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "run"))
    (run / "summary.json").unlink()
    write(run / "conf" / file, text)
    write(tmp_path / "elsewhere" / "distill" / "other.yaml", LOSS)
    write(tmp_path / "evil.py", "import os\nos.mkdir('mark')\n")
    (run / "overrides.yaml").write_text(json.dumps(["distill=none", *TINY_RUN, *overrides]))
    sys.path.insert(0, str(tmp_path))
    assert cli([verb, "run"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "mark").exists()
    assert "evil" not in sys.modules


def test_no_file_of_a_folder_is_copied_out_of_the_run(tmp_path: Path) -> None:
    write(tmp_path / "outside.yaml", "seed: 1\n")
    write(tmp_path / "mine" / "experiment" / "evil.yaml", "# @package _global_\ndefaults: [/../outside]\n")
    config_folders.set_config_dirs([f"config_dirs=[{tmp_path / 'mine'}]"])
    try:
        files = compose.own_files(["experiment=evil"])
    except Exception:
        return
    assert list(files) == ["experiment/evil.yaml"]


def test_the_teachers_run_may_not_be_told_folders(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "mine" / "experiment" / "evil.yaml", "# @package _global_\nteacher: {run: ['config_dirs=[x]']}\n")
    assert cli(["train", "--config-dir", "mine", "experiment=evil", *TINY, "distill=mimic"]) == 1
    assert "teacher.run" in capsys.readouterr().err


def test_a_module_in_the_current_folder_replaces_no_library(tmp_path: Path) -> None:
    """``python -m`` would put the folder first on the path."""
    write(tmp_path / "torch.py", "raise SystemExit('imported')")
    write(tmp_path / "hydra_plugins" / "evil.py", "raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-m", "distill", "train", "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
