"""PredictionImages: what is drawn where, that nothing strange stops them, and that files are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from distill.evaluation.pictures import label_color, panel, save_panel
from distill.types import Detections, DistillError, Target

CLASSES = [f"class name {k}" for k in range(1, 4)]
GREY = torch.full((3, 480, 640), 100, dtype=torch.uint8)


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def has(picture: Image.Image, label: int) -> bool:
    return bool((np.asarray(picture) == label_color(label)).all(-1).any())


def test_draws_each_column_with_its_own_boxes() -> None:
    truth = Target(torch.tensor([[100.0, 100.0, 300.0, 200.0]]), torch.tensor([1]))
    teacher = found([[100, 100, 300, 200]], [0.9], [2])
    sheet = panel(GREY, {"truth": truth, "teacher": teacher, "student": found([], [], [])}, CLASSES)
    thirds = [sheet.crop((i * sheet.width // 3, 0, (i + 1) * sheet.width // 3, sheet.height)) for i in range(3)]
    assert [[has(third, label) for label in (1, 2)] for third in thirds] == [
        [True, False],
        [False, True],
        [False, False],
    ]


def test_boxes_lie_where_they_belong_at_every_scale() -> None:
    """The outline's extreme pixels, measured against the box scaled by hand."""
    for side, scale in ((128, 480 / 128), (480, 1.0), (640, 1.0), (1600, 0.5)):
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        box = [0.25 * side, 0.5 * side, 0.75 * side, 0.875 * side]
        sheet = np.asarray(panel(image, {"t": Target(torch.tensor([box]), torch.tensor([1]))}, [" "]))
        rows, columns = np.nonzero((sheet == label_color(1)).all(-1))
        left, bottom = 6 + box[0] * scale, 26 + box[3] * scale
        assert abs(columns.min() - left) <= 1
        assert abs(columns.max() - (6 + box[2] * scale)) <= 1
        assert abs(rows.max() - bottom) <= 1


def test_low_scores_are_left_out_of_detections_only() -> None:
    boxes = [[50.0, 50.0, 90.0, 90.0], [200.0, 200.0, 300.0, 300.0]]
    assert not has(panel(GREY, {"d": found(boxes, [0.9, 0.49], [1, 2])}, CLASSES), 2)
    assert has(panel(GREY, {"d": found(boxes, [0.9, 0.5], [1, 2])}, CLASSES), 2)
    assert has(panel(GREY, {"d": found(boxes, [0.9, 0.1], [1, 2])}, CLASSES, min_score=0), 2)
    assert has(panel(GREY, {"t": Target(torch.tensor(boxes), torch.tensor([1, 2]))}, CLASSES, min_score=2.0), 2)


def test_neighbouring_labels_have_different_colours() -> None:
    colours = np.array([label_color(label) for label in range(1, 41)])
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(40)
    assert apart.min() > 10
    assert np.abs(np.diff(colours, axis=0)).sum(-1).min() > 150


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (2000, 40), (128, 128)])
def test_survives_sizes_and_strange_boxes(size: tuple[int, int]) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = [
        [nan, 0, 1, 1],
        [0, 0, inf, 1],
        [50, 50, 10, 10],
        [-1e9, -1e9, 1e9, 1e9],
        [0, 0, 0, 0],
        [9e8, 9e8, 9e9, 9e9],
    ]
    strange = found(boxes, [0.9] * 6, [1, 2, 3, 0, 7, -1])
    image = torch.zeros(3, *size, dtype=torch.uint8)
    sheet = panel(image, {"a very long caption " * 9: strange, "": found([], [], [])}, CLASSES)
    assert sheet.mode == "RGB"
    assert max(sheet.width / 2, sheet.height) <= 850


def test_changes_nothing_given() -> None:
    image, boxes = (
        torch.full((3, 40, 50), 7, dtype=torch.uint8),
        torch.tensor([[1.0, 2.0, 60.0, 30.0]], requires_grad=True),
    )
    panel(image, {"a": Detections(boxes, torch.tensor([0.9]).half(), torch.tensor([1]))}, CLASSES)
    assert (image == 7).all()
    assert boxes.tolist() == [[1.0, 2.0, 60.0, 30.0]]


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8).byte(), torch.zeros(1, 3, 8, 8).byte()])
def test_refuses_other_images(image: torch.Tensor) -> None:
    with pytest.raises(DistillError, match="uint8 image"):
        panel(image, {"a": found([], [], [])}, CLASSES)
    with pytest.raises(DistillError, match="0 columns"):
        panel(GREY, {}, CLASSES)


def test_saves_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = panel(GREY, {"a": found([], [], [])}, CLASSES)
    path = save_panel(tmp_path / "new" / "panel.png", sheet)
    assert (np.asarray(Image.open(path)) == np.asarray(sheet)).all()
    assert save_panel(str(tmp_path / "panel.JPG"), sheet).stat().st_size > 0
    before = path.read_bytes()

    def half(self: Image.Image, file: BinaryIO, format: str) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_panel(path, sheet)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["panel.png"]
    with pytest.raises(DistillError, match=r"name\.png"):
        save_panel(tmp_path / "panel", sheet)


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool])
def test_masks_are_laid_over_their_pixels_and_no_others(kind: torch.dtype) -> None:
    mask = torch.zeros(2, 480, 640, dtype=kind)
    mask[0, 110:190, 150:250] = 1
    mask[1, 300:400, 150:250] = 1  # of too low a score
    boxes = [[100.0, 100.0, 300.0, 200.0], [100.0, 300.0, 300.0, 400.0]]
    things = found(boxes, [0.9, 0.1], [1, 1])._replace(masks=mask)
    plain, veiled = (np.asarray(panel(GREY, {"d": each}, [" "])) for each in (things._replace(masks=None), things))
    rows, columns = np.nonzero((plain != veiled).any(-1))
    assert (rows.min(), rows.max()) == (26 + 110, 26 + 189)
    assert (columns.min(), columns.max()) == (6 + 150, 6 + 249)
    assert (plain != veiled).any(-1).sum() == 80 * 100
