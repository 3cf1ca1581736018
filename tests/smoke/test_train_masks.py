"""Mask R-CNN from the command line, on drawn shapes and, where they are at hand, on COCO's images."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from pycocotools import mask as coco

from distill import load_detector
from helpers.image_folders import drawn
from helpers.runs import TINY, TINY_HEADS, TINY_MODEL, TINY_RUN, Cli, summary

MASKS = ["model=mask_rcnn_r10_mini", "data.masks=true", *TINY]


def terms(run: Path) -> dict[str, float]:
    found = summary(run)["terms"]
    assert all(math.isfinite(value) for value in found.values())
    return dict(found)


def test_trains_distils_evaluates_and_predicts(cli: Cli, tmp_path: Path) -> None:
    assert cli(["train", "distill=none", *MASKS, "hydra.run.dir=first"]) == 0
    assert "term/student/loss_mask" in terms(tmp_path / "first")
    assert (
        cli(["train", "distill=defeat", "teacher.weights=first", *MASKS, "metric=val/mask_AP", "hydra.run.dir=run"])
        == 0
    )
    found, report = terms(tmp_path / "run"), summary(tmp_path / "run")
    assert "term/student/loss_mask" in found
    assert any(name.startswith("term/defeat") for name in found)
    assert 0 <= report["student"]["val/mask_AP"] <= 1
    assert 0 <= report["teacher"]["values"]["val/mask_AP"] <= 1
    assert load_detector(tmp_path / "run").spec.family == "mask_rcnn"
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 1
    for source in ("run", "run/checkpoints/best.ckpt"):
        assert cli(["evaluate", source, "--json", "found.json"]) == 0
        measured = json.loads(Path("found.json").read_text())
        assert {f"val/{name}": value for name, value in measured.items()} == report["student"]
    (tmp_path / "images").mkdir()
    for record, picture in drawn("val", 2)[1]:
        picture.resize((100, 80)).save(tmp_path / "images" / f"{record.id}.png")
    assert cli(["predict", "run", "images", "--out", "found"]) == 0
    results = json.loads(Path("found/detections.json").read_text())
    for result in results:
        assert coco.decode(result["segmentation"]).shape == (80, 100)


def test_a_loss_of_the_mask_head_can_be_weighted(cli: Cli, tmp_path: Path) -> None:
    assert cli(["train", "distill=none", *MASKS, "supervised.loss_mask=0.5", "pictures=0", "hydra.run.dir=run"]) == 0
    found = terms(tmp_path / "run")
    assert found["loss/student/loss_mask"] == pytest.approx(0.5 * found["term/student/loss_mask"])


def test_a_teacher_without_masks_teaches_boxes(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = ["distill=defeat_full", f"teacher.weights={tiny_teacher}", *MASKS, "hydra.run.dir=run"]
    assert cli(["train", *lines]) == 0
    assert "term/student/loss_mask" in terms(tmp_path / "run")
    assert 0 <= summary(tmp_path / "run")["student"]["val/mask_AP"] <= 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model=mask_rcnn_r10_mini"], "data.masks=true"),
        (["data.masks=true", "metric=val/mask_AP"], "the student, a faster_rcnn, finds none"),
        (["data=voc", "data.masks=true"], "has boxes only"),
    ],
)
def test_refused_before_anything_is_trained(
    lines: list[str], message: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = [line for line in TINY if "data=voc" not in lines or not line.startswith("data.source")]
    assert cli(["train", *lines, *fitting, "hydra.run.dir=run"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert "training one first" not in said.out
    assert "Epoch" not in said.out


def test_a_few_steps_on_real_images(cli: Cli, tmp_path: Path) -> None:
    top = os.environ.get("DISTILL_TEST_DATA")
    if not top:
        pytest.skip("set DISTILL_TEST_DATA to the folder that holds tiny_coco")
    size = ["data.min_size=96", "data.max_size=128", "data.limit=8", "data.limit_eval=8", "data.batch_size=4"]
    lines = ["data=coco", f"data.source.root={top}/tiny_coco", "data.masks=true", "model=mask_rcnn_r18", *size]
    fitting = [*lines, "data.workers=0", "distill=none", *TINY_MODEL, *TINY_HEADS, *TINY_RUN, "hydra.run.dir=run"]
    assert cli(["train", *fitting]) == 0
    assert 0 <= summary(tmp_path / "run")["student"]["val/mask_AP"] <= 1
