"""The verb analyze on finished runs: its files, what it refuses, and what it leaves out."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from omegaconf import OmegaConf
from PIL import Image

from distill.analysis.run_page import MAPS, PLOTS
from helpers.runs import TINY, Cli
from helpers.wandb_files import read_wandb

KINDS = {"classification", "localization", "both", "duplicate", "background", "missed"}


@pytest.fixture(scope="module")
def runs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distilled run, and the tiny teacher's run as a run of another student alone."""
    from distill.cli.main import main

    folder = tmp_path_factory.mktemp("analyzed")
    words = [f"teacher.weights={tiny_teacher}", *TINY, f"hydra.run.dir={folder}/run", f"paths.outputs={folder}"]
    assert main(["train", *words]) == 0
    shutil.copytree(tiny_teacher, folder / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def analysis(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "analysis" / "analysis.json").read_text())
    return content


def table(run: Path, name: str) -> list[dict[str, str]]:
    with (run / "analysis" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_of_an_analysis(runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--against", str(runs / "alone"), "--images", "2", "--pictures", "1", "--similar", "circle,square"]
    assert cli(["analyze", str(runs / "run"), *words]) == 0
    output = capsys.readouterr().out
    assert "– %" not in output  # a share of nothing
    assert "AP50 that errors of each kind cost" in output
    assert str(runs / "run" / "analysis") in output
    content, run = analysis(runs / "run"), runs / "run"
    page = (run / "report.html").read_text(encoding="utf-8")
    for part in ("distilled (dsig)", "AP50 that errors of each kind cost", "the threshold with the best F1"):
        assert part in page
    assert page.count("data:image/png") > 8
    assert len(page) < 5_000_000
    assert set(content["models"]) == {"teacher", "baseline", "student"}
    assert content["images"] == 4
    for model in content["models"]:
        assert set(content["errors"][model]["ap50_gain"]) == KINDS
        assert {row["kind"] for row in table(run, "errors") if row["model"] == model} == KINDS
        summary = json.loads((run / "summary.json").read_text())
        results = summary["teacher"]["values"] if model == "teacher" else summary["student"]
        if model != "baseline":
            assert content["errors"][model]["ap50"] == pytest.approx(results["val/AP50"])
    # the baseline is the teacher's own run: it agrees with the teacher
    assert content["errors"]["baseline"] == content["errors"]["teacher"]
    assert {row["model"]: float(row["error"]) for row in table(run, "edges")}["baseline"] == pytest.approx(0, abs=1e-9)
    assert all(float(row["all"]) == pytest.approx(1) for row in table(run, "cka") if row["model"] == "baseline")
    pictures = {file.stem for file in (run / "analysis").glob("*.png")}
    shown = {name for captions in (*PLOTS.values(), *MAPS.values()) for name in captions}
    assert pictures == shown - {"gradient_shares"}  # of a run of two steps
    assert all(str(escape(caption)) in page for caption in MAPS["Student and teacher"].values())
    assert pictures >= {"errors", "shares", "precision_recall", "f1", "confusion", "calibration", "agreement"}
    assert pictures >= {"terms", "gradients", "gradients_examples", "distances", "ssim", "ssim_examples", "cka"}
    for file in (run / "analysis").rglob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            assert max(picture.convert("L").getextrema()) > min(picture.convert("L").getextrema())


def test_a_run_without_a_teacher(runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["analyze", str(runs / "alone"), "--images", "1"]) == 0
    content = analysis(runs / "alone")
    assert set(content["models"]) == {"student"}
    assert content["agreement"] == {}
    assert content["skipped"]["cka"] == "the run has no teacher"
    assert "gradients" in content
    assert "distances, ssim, cka, edges: the run has no teacher" in capsys.readouterr().out


def test_what_is_refused(runs: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert cli(["analyze", *words]) == 1
        return capsys.readouterr().err

    def changed(name: str, **changes: Any) -> str:
        shutil.copytree(runs / "alone", tmp_path / name)
        file = tmp_path / name / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(tmp_path / name)

    run = str(runs / "run")
    assert "is not a run" in refused(str(tmp_path))
    unfinished = Path(changed("unfinished"))
    (unfinished / "summary.json").unlink()
    assert "unfinished, it has no summary.json" in refused(str(unfinished))
    assert "unfinished, it has no summary.json" in refused(run, "--against", str(unfinished))
    newer = changed("newer", versions={"distill": "99.0"})
    assert "written by distill 99.0, newer than" in refused(newer)
    assert "expected the run's results" in refused(changed("damaged", student=None))
    other = changed("other", measured={"metrics": {}, "data": {"val": "0"}})
    assert "measured on another val split" in refused(run, "--against", other)
    assert "the analyzed run itself" in refused(run, "--against", run)
    assert "the data has train, val only" in refused(run, "--split", "test")
    assert "got oval" in refused(run, "--similar", "circle,oval")
    described = Path(changed("classes")) / "student.json"
    content = json.loads(described.read_text())
    content["model"]["classes"] = [f"other {name}" for name in content["model"]["classes"]]
    described.write_text(json.dumps(content))
    assert "Name a run of the same classes" in refused(run, "--against", str(described.parent))
    assert "start at 0" in refused(run, "--images", "-1")


def test_an_analysis_continues_the_wandb_run_of_the_training(
    runs: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = runs / "run", ["--images", "2", "--pictures", "1", "--wandb"]
    assert cli(["analyze", str(run), *words]) == 1
    assert "trained without logger=wandb" in capsys.readouterr().err
    shutil.copytree(run, "logged")
    run = Path("logged").resolve()
    config = OmegaConf.load(run / "config.yaml")
    config.logger.wandb = {"_target_": "distill.WandbRun", "group": "a group", "offline": True, "folder": "elsewhere"}
    OmegaConf.save(config, run / "config.yaml")
    (run / "wandb_id").write_text("a1b2c3")
    assert cli(["analyze", str(run), *words]) == 0
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert file.name == "run-a1b2c3.wandb"
    content = analysis(run)
    logged = read_wandb(file, lambda logged: "analysis/errors/student/ap50" in logged.summary)
    assert logged.run.run_group == "a group"
    for model in ("teacher", "student"):
        for key in ("ap50", "ap50_gain/missed"):
            value = content["errors"][model]
            for part in key.split("/"):
                value = value[part]
            assert logged.summary[f"analysis/errors/{model}/{key}"] == pytest.approx(value)
    names = {f"{file.stem}_figure" for file in (run / "analysis").glob("*.png")}
    tables = {f"{file.stem}_table" for file in (run / "analysis").glob("*.csv")}
    (file,) = run.glob("wandb/offline-run-*/files/media/table/analysis/errors_table_*.json")
    rows = json.loads(file.read_text())["data"]
    expected = [[*list(row.values())[:2], *map(float, list(row.values())[2:])] for row in table(run, "errors")]
    assert rows == expected
    found = {"/".join(name.split("/")[:2]) for name in logged.logged}  # the parts of an image have names of their own
    assert {f"analysis/{name}" for name in names | tables | {"to_do"}} <= found
