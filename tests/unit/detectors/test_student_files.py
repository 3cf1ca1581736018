"""Checkpoints of a run as files of weights: they describe their student, as its exported files do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.detectors import registry
from distill.detectors.faster_rcnn import FasterRCNN
from distill.types import DistillError
from helpers.detectors import random_detector, small_options


def write_checkpoint(path: Path, student: Any) -> Path:
    """The parts of a run's checkpoint that describe its student, beside a tensor of a loss."""
    state = {f"student.net.{name}": value for name, value in student.net.state_dict().items()}
    content = {"student": student.describe(), "student_format": 2, "epoch": 1}
    torch.save({**content, "state_dict": {**state, "losses.mimic.adapter.weight": torch.zeros(2)}}, path)
    return path


def test_a_checkpoint_comes_back_as_its_student(tmp_path: Path) -> None:
    student = random_detector("faster_rcnn", norm_eps=1e-3)
    detector = registry.load_detector(write_checkpoint(tmp_path / "best.ckpt", student))
    assert detector.describe() == student.describe()
    state = student.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in detector.net.state_dict().items())


def test_a_checkpoint_gives_a_new_detector_its_weights_and_class_names(tmp_path: Path) -> None:
    student = random_detector("faster_rcnn")
    weights = str(write_checkpoint(tmp_path / "best.ckpt", student))
    options = small_options("faster_rcnn", {"head_channels": 32}, neck_channels=32, norm="frozen")
    assert FasterRCNN(weights=weights, **options).classes == ("cat", "dog", "owl")
    owl = FasterRCNN(["owl"], weights=weights, **options).net.roi_heads.box_predictor.cls_score
    assert torch.equal(owl.weight, student.net.roi_heads.box_predictor.cls_score.weight[[0, 3]])


def test_a_checkpoint_with_a_description_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.ckpt", random_detector("retinanet"))
    content = torch.load(path, weights_only=True)
    for student, words in (("a text", "expected an object"), ({"classes": 3}, "list of names")):
        torch.save({**content, "student": student}, path)
        with pytest.raises(DistillError, match=words):
            registry.load_detector(path)
