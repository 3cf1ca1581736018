"""Detections are collected without a Python loop over boxes: as many calls for a thousand boxes an image as for ten."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch

from distill.evaluation.coco import CocoMetric
from distill.evaluation.evaluate import relabel_detections
from distill.types import Detections

CLASSES = ("cat", "dog")


def empty_truth() -> dict[str, Any]:
    return {
        "images": [{"id": image, "width": 640, "height": 480} for image in (1, 2)],
        "annotations": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)],
    }


def detections(count: int) -> Detections:
    corners = torch.rand(count, 2) * 100
    boxes = torch.cat([corners, corners + 10], dim=1)
    return Detections(boxes, torch.rand(count).sort(descending=True).values, torch.randint(1, 3, (count,)))


def work(count: int) -> int:
    """Calls, of Python and of C, and lines that it takes to collect so many detections of each of two images."""
    metric, found, labels = CocoMetric(empty_truth(), CLASSES), [detections(count)] * 2, torch.arange(3)
    metric.update((1,), found[:1])  # what happens only the first time
    events = 0

    def note(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal events
        events += 1
        return note

    before = sys.getprofile(), sys.gettrace()
    sys.setprofile(note)
    sys.settrace(note)
    try:
        metric.update((1, 2), [relabel_detections(one, labels) for one in found])
    finally:
        sys.settrace(before[1])
        sys.setprofile(before[0])
    assert sum(len(part) for part in metric.scores) == 3 * count  # it was all collected
    return events


def test_collecting_a_thousand_boxes_takes_no_more_python_than_ten() -> None:
    assert work(1000) == work(10)


def test_the_count_sees_a_loop_over_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    update = CocoMetric.update

    def slow(self: CocoMetric, ids: Any, found: Any) -> None:
        for one in found:
            for score in one.scores.tolist():
                float(score)
        update(self, ids, found)

    monkeypatch.setattr(CocoMetric, "update", slow)
    assert work(1000) > work(10) + 1000
