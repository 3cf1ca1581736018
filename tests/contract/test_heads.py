"""Methods that teach the heads, on real detectors: against torchvision's own losses, and down to every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.chen import Chen
from distill.losses.tadf import TADF
from distill.types import DistillError
from helpers.detectors import FAMILIES, gradients, padded_batch, random_detector

OFF: dict[str, Any] = {"rpn": {"soft": 0, "box": 0}, "rcn": {"soft": 0, "box": 0}, "hint": {"neck": 0}}


class Knowing:
    """A teacher that says of the student's anchors and regions what ground truth says, surely."""

    def __init__(self, student: Any) -> None:
        self.student, self.anchors = student, student.anchors

    @property
    def objectness(self) -> dict[int, Tensor]:
        wanted = 100.0 * (2 * (self.student.anchor_targets.labels > 0) - 1)
        parts = wanted.split([len(boxes) for boxes in self.anchors.values()], dim=1)
        return {
            stride: part.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
            for (stride, x), part in zip(self.student.objectness.items(), parts, strict=True)
        }

    def roi_logits(self, boxes: Any) -> tuple[Tensor, Tensor]:
        logits, deltas = self.student.roi_logits(boxes)
        labels = torch.cat(self.student.rois.labels)
        return 100.0 * torch.nn.functional.one_hot(labels, logits.shape[1]).float(), torch.zeros_like(deltas)


def test_soft_labels_of_a_knowing_teacher_are_torchvision_s_own_losses() -> None:
    """So mu + (1 - mu) keeps the loss where the teacher says no more than the labels do."""
    student = random_detector("faster_rcnn")
    view = student.view(padded_batch(), seed=3)
    loss = Chen(student.spec, student.spec, **{**OFF, "rpn": {"soft": 1, "box": 0}, "rcn": {"soft": 1}}, background=1)
    values = loss(view, Knowing(view))  # type: ignore[arg-type]
    assert values["rpn.soft"].item() == pytest.approx(view.losses["loss_objectness"].item(), rel=1e-5)
    assert values["rcn.soft"].item() == pytest.approx(view.losses["loss_classifier"].item(), rel=1e-5)
    assert values["rcn.box"] > 0


MAPS_ONLY: dict[type[DistillLoss], dict[str, Any]] = {
    Chen: {**OFF, "hint": {}},
    TADF: {"head": {"classification": 0, "regression": 0}},
}


@pytest.mark.parametrize("method", MAPS_ONLY)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_pair_is_taught_down_to_the_body(method: type[Any], family: str) -> None:
    student, teacher = random_detector(family), random_detector(family, seed=1, neck_channels=64, width=0.5)
    loss = method(student.spec, teacher.spec, **({} if "rois" in student.spec.outputs else MAPS_ONLY[method]))
    values = loss(student.view(padded_batch(), seed=3), teacher.view(padded_batch(), frozen=True, seed=4))
    assert values.keys() == loss.weights.keys()
    assert all(value.isfinite() for value in values.values())
    torch.stack(list(values.values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student_gradients = gradients(student)
    assert all(gradient.isfinite().all() for gradient in student_gradients.values())
    assert any(name.startswith("backbone.body") and gradient.any() for name, gradient in student_gradients.items())
    if "rois" in student.spec.outputs:
        assert student_gradients["roi_heads.box_predictor.cls_score.weight"].any()
        assert ("rpn.head.cls_logits.weight" in student_gradients) == (method is Chen)


@pytest.mark.parametrize("method", MAPS_ONLY)
def test_a_dense_head_is_refused(method: type[Any]) -> None:
    spec = random_detector("retinanet").spec
    with pytest.raises(DistillError, match=r"the student is a retinanet, which has no (rois|objectness)"):
        method(spec, spec)
