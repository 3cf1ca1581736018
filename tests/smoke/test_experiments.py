"""Every recipe composes with its settings, runs two steps on small data, and is a clean baseline without losses."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill.cli.config import compose
from distill.cli.reports import teacher_notice
from distill.cli.runs import assembly, teacher_cache
from distill.types import DistillError
from helpers.grids import mostly_exhaustive
from helpers.image_folders import write_coco, write_voc
from helpers.runs import TINY_HEADS, TINY_MODEL, TINY_QUERIES, TINY_RUN, Cli, summary

EXPERIMENTS = [name for name in compose.config_groups()["experiment"] if name != "demo"]
"""On data sets in folders."""
UNKNOWN = [name for name in EXPERIMENTS if any(family in name for family in ("_rtdetr_", "_dfine_"))]
"""Recipes of detectors for which no number is published."""
WITHOUT_TEACHER = ("foundation_coco_dfine_s",)
"""Recipes whose teacher is no detector."""
DAILY = ["bccd", "dsig_coco_mask_rcnn_r50_r18", "dsig_coco_retinanet_r50_mnv2", "tadf_voc_frcnn_r152_r50"]
"""Recipes that between them have every family, source of data and kind of backbone."""


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("data")
    write_coco(top / "coco")
    write_voc(top / "devkit" / "VOC2007", {"trainval": ("train", 4), "test": ("val", 4)})
    write_voc(top / "devkit" / "VOC2012", {"trainval": ("train", 4)})
    write_voc(top / "bccd", {"trainval": ("train", 8), "test": ("test", 4)})
    return {"coco": top / "coco", "voc": top / "devkit", "bccd": top / "bccd"}


def folder(experiment: str, data_sets: dict[str, Path]) -> Path:
    return data_sets[next(name for name in data_sets if name in experiment.split("_"))]


def tiny(experiment: str, root: Path) -> list[str]:
    if experiment in UNKNOWN:
        pytest.importorskip("transformers", reason="the extra detr is not installed")
        family = [] if "_dfine_" in experiment else ["model.backbone.depth=10"]
        made: list[str] = []
        if experiment.startswith("foundation"):
            pytest.importorskip("timm", reason="the vision transformers are timm's")
            made = [f"distill.losses.foundation.model.{line}" for line in ("name=test_vit.r160_in1k", "weights=random")]
        sizes = [f"data.source.root={root}", "data.min_size=64", "data.max_size=64", "data.batch_size=2"]
        return [f"experiment={experiment}", *TINY_QUERIES, *family, *made, *TINY_RUN, *sizes, "data.workers=0"]
    other = any(f"_{backbone}" in experiment for backbone in ("mnv2", "eb0"))  # which have no depth, and one width
    model = [
        line for line in TINY_MODEL if not (other and line.startswith(("model.backbone.depth", "model.backbone.width")))
    ]
    lines = [*model, *TINY_RUN, f"data.source.root={root}", "data.min_size=64", "data.max_size=96"]
    heads = [] if "retinanet" in experiment else TINY_HEADS
    return [f"experiment={experiment}", *lines, *heads, "data.batch_size=2", "data.workers=0"]


@pytest.mark.parametrize("experiment", mostly_exhaustive(EXPERIMENTS, DAILY))
def test_recipe_trains_and_its_baseline_is_clean(
    experiment: str, data_sets: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    root = folder(experiment, data_sets)
    lines = tiny(experiment, root)
    alone = [line for line in lines if not line.startswith("distill.losses.")]
    assert cli(["train", *alone, "distill=none", "init=scratch", "hydra.run.dir=teacher"]) == 0
    baseline = summary(tmp_path / "teacher")
    assert baseline["teacher"] is None
    assert not [name for name in baseline["terms"] if "student/" not in name and name != "loss/total"]

    teacher = [] if experiment in WITHOUT_TEACHER else ["teacher.weights=teacher"]
    assert cli(["train", *lines, *teacher, "hydra.run.dir=run"]) == 0
    report = summary(tmp_path / "run")
    losses = compose.compose_config([f"experiment={experiment}"]).distill.losses
    assert all(any(name.startswith(f"term/{loss}/") for name in report["terms"]) for loss in losses)
    assert ("val/mAP" in report["student"]) == ("_voc_" in experiment)


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "demo"])
def test_header_says_command_and_expected_number(experiment: str) -> None:
    """And where the number is from: the method's paper, and its table or the text that stands in for it."""
    text = (compose.config_folder() / "experiment" / f"{experiment}.yaml").read_text()
    header = " ".join(text.split("\ndefaults:")[0].replace("\n#", " ").split())
    assert f"experiment={experiment} " in header
    if experiment in ("bccd", "demo"):  # no paper's
        assert "Measured values" in header
        assert "docs/results.md" in header
        return
    assert re.search(r"arXiv \d{4}\.\d{5}|(CVPR|ICCV|ECCV|ICLR|NeurIPS) \d{4}", header)
    expected = header.partition(" Expected ")[2]
    source = r"tables? \d|README of the release|abstract|second-hand"
    if re.match(r"AP: unknown[,.] ", expected):  # and then what is known of the nearest pair, with its source
        assert experiment in UNKNOWN
        source += r"|nothing is published"
    else:
        assert experiment not in UNKNOWN
    assert re.search(r"\d\d\.\d", expected)
    assert re.search(source, expected)


@pytest.mark.parametrize("experiment", mostly_exhaustive(EXPERIMENTS, DAILY))
def test_recipe_without_losses_leaves_none_behind(experiment: str) -> None:
    cfg = compose.compose_config([f"experiment={experiment}", "distill=none"])
    assert not cfg.distill.losses


OF_TEACHER: list[list[str]] = [
    [],
    ["teacher.model.backbone.norm=frozen"],
    ["teacher=retinanet_r18", "teacher.model.pixels.mean=[0.4,0.4,0.4]"],
]
TWO_STAGE = ("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test", "box_batch_size_per_image")
"""Options of the teacher that some recipes set, and that a RetinaNet does not have."""
OWN_RUNS = list(itertools.product([name for name in EXPERIMENTS if name not in WITHOUT_TEACHER], OF_TEACHER))


@pytest.mark.parametrize(("experiment", "more"), mostly_exhaustive(OWN_RUNS, [(DAILY[0], OF_TEACHER[1])]))
def test_the_teachers_own_run_has_the_model_that_is_printed(
    experiment: str, more: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch, data_sets: dict[str, Path]
) -> None:
    """And what is said of the student's model alone does not reach it."""
    made: list[tuple[Any, Any]] = []

    def look(options: Any, data: Any) -> None:
        made.append(
            (
                options.model,
                compose.compose_config([*teacher_cache.teacher_overrides(options), "hydra.run.dir=."]).model,
            )
        )
        raise DistillError("seen")

    monkeypatch.setattr(teacher_notice, "announce_teacher", lambda *_: None)
    monkeypatch.setattr(assembly, "find_teacher", look)
    monkeypatch.setattr(assembly, "build_losses", lambda *_: {})
    # Some of these pairs do not fit, which is refused earlier.
    monkeypatch.setattr(assembly, "planned_teacher", lambda *_: SimpleNamespace(options={}, spec=None))
    for check in ("check_squares", "inherited_tensors"):
        monkeypatch.setattr(assembly, check, lambda *_, **__: None)
    root = folder(experiment, data_sets)
    removed = []
    if "teacher=retinanet_r18" in more:
        options = compose.compose_config([f"experiment={experiment}", "teacher=retinanet_r18"]).teacher.model
        removed = [f"~teacher.model.{name}" for name in TWO_STAGE if name in options]
    lines = [*tiny(experiment, root), "model.score_thresh=0.2", *more, *removed, "hydra.run.dir=run"]
    assert cli(["train", *lines]) == 1
    printed, used = made[0]
    assert OmegaConf.to_container(used) == printed
    assert used.score_thresh == (0.0 if used._target_ in ("distill.RTDETR", "distill.DFine") else 0.05)
