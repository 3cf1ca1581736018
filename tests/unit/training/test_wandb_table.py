"""The table of predictions: which objects and detections count as right."""

from __future__ import annotations

import torch

from distill.training.wandb_table import _counts, _found_colors, compare
from distill.types import Detections, Target

BOX = [10.0, 10.0, 30.0, 30.0]
FAR = [50.0, 50.0, 70.0, 70.0]


def found(*rows: tuple[list[float], int, float]) -> Detections:
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def test_objects_and_detections_by_agreement() -> None:
    """Four objects: found by both, by the teacher (the student names another class), by the student, by none."""
    boxes = [BOX, FAR, [80.0, 80.0, 90.0, 90.0], [0.0, 90.0, 5.0, 95.0]]
    target = Target(torch.tensor(boxes), torch.tensor([1, 2, 1, 1]))
    student = found((BOX, 1, 0.9), (FAR, 1, 0.8), (boxes[2], 1, 0.7), (BOX, 1, 0.6))
    teacher = found((BOX, 1, 0.9), (FAR, 2, 0.9))
    objects, right = compare(target, {"student": student, "teacher": teacher})
    assert right["student"].tolist() == [True, False, True, False]  # wrong class; duplicate
    assert right["teacher"].tolist() == [True, True]
    assert _found_colors(objects) == [1, 2, 3, 4]
    assert _counts(objects) == [2, 2, 1, 1]


def test_an_image_without_objects_and_a_run_without_a_teacher() -> None:
    objects, right = compare(
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), {"student": found((BOX, 1, 0.9))}
    )
    assert right["student"].tolist() == [False]
    assert _found_colors(objects) == []
    assert _counts(objects) == [0, None, None, None]
