"""Every recipe composes with its settings, runs two steps on a stand-in data set, and is a clean baseline without losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from standins import write_coco, write_voc

from conftest import TINY_HEADS, TINY_MODEL, TINY_RUN, Cli, summary
from distill.cli import config

EXPERIMENTS = config.groups()["experiment"]


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("data")
    write_coco(top / "coco")
    write_voc(top / "devkit" / "VOC2007", {"trainval": ("train", 4), "test": ("val", 4)})
    write_voc(top / "devkit" / "VOC2012", {"trainval": ("train", 4)})
    write_voc(top / "bccd", {"trainval": ("train", 8), "test": ("test", 4)})
    return {"coco": top / "coco", "voc": top / "devkit", "bccd": top / "bccd"}


def tiny(experiment: str, root: Path) -> list[str]:
    lines = [*TINY_MODEL, *TINY_RUN, f"data.source.root={root}", "data.min_size=64", "data.max_size=96"]
    heads = [] if "retinanet" in experiment else TINY_HEADS
    return [f"experiment={experiment}", *lines, *heads, "data.batch_size=2", "data.workers=0"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipe_trains_and_its_baseline_is_clean(
    experiment: str, data_sets: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    root = data_sets["bccd" if experiment == "bccd" else experiment.split("_")[1]]
    lines = tiny(experiment, root)
    assert cli(["train", *lines, "distill=none", "hydra.run.dir=teacher"]) == 0
    baseline = summary(tmp_path / "teacher")
    assert baseline["teacher"] is None
    assert not [name for name in baseline["terms"] if "student/" not in name and name != "loss/total"]

    assert cli(["train", *lines, "teacher.weights=teacher", "hydra.run.dir=run"]) == 0
    report = summary(tmp_path / "run")
    method = "defeat" if experiment == "bccd" else experiment.split("_")[0]
    assert any(name.startswith(f"term/{method}/") for name in report["terms"])
    assert ("val/mAP" in report["student"]) == ("_voc_" in experiment)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_header_says_command_and_expected_number(experiment: str) -> None:
    text = (config.folder() / "experiment" / f"{experiment}.yaml").read_text()
    header = text.split("\ndefaults:")[0]
    assert f"experiment={experiment}" in header
    assert "Expected" in header or "Measured" in header


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipe_without_losses_leaves_none_behind(experiment: str) -> None:
    cfg = config.composed([f"experiment={experiment}", "distill=none"])
    assert not cfg.distill.losses
