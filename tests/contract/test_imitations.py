"""Losses that imitate features, with real detectors: the gradient of a step reaches only student and loss.

Losses that need shared strides only teach across families and backbones for some steps, down to the student's body.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from distill.losses.mimic import Mimic
from helpers.detectors import padded_batch, random_detector
from helpers.methods import IMITATIONS

FAMILY_PAIRS = [*itertools.product(("faster_rcnn", "retinanet"), repeat=2), ("mask_rcnn", "mask_rcnn")]
NAMES = (
    "mimic",
    "mimic of proposals",
    "mimic of predictions",
    "fgfi",
    "fgfi on all levels",
    "pad of mimic",
    "pad of fgfi",
)
CASES = [
    (student, teacher, name)
    for student, teacher in FAMILY_PAIRS
    for name in NAMES
    if student != "retinanet" or not IMITATIONS[name].needs_proposals
]


@pytest.mark.parametrize(("student_family", "teacher_family", "name"), CASES, ids=lambda value: value)
def test_a_step_reaches_the_student_and_the_loss_but_not_the_teacher(
    student_family: str, teacher_family: str, name: str
) -> None:
    student, teacher = random_detector(student_family), random_detector(teacher_family, seed=1, neck_channels=48).eval()
    loss, data = IMITATIONS[name].build(student=student.spec, teacher=teacher.spec), padded_batch()
    values = loss(student.view(data), teacher.view(data, frozen=True, seed=0))
    assert values.keys() == loss.weights.keys()
    assert all(value.isfinite() and value > 0 for value in values.values())
    sum(values.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())
    neck = [parameter.grad for key, parameter in student.named_parameters() if "fpn" in key]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in neck)
    assert all(parameter.grad is None for parameter in teacher.parameters())


UNLIKE_PAIRS: dict[str, Any] = {
    "retinanet by fcos": (("retinanet", {}), "fcos"),
    "retinanet by faster_rcnn": (("retinanet", {}), "faster_rcnn"),
    "mobilenet by resnet": (("faster_rcnn", {"backbone": "mobilenet_v2", "depth": None}), "faster_rcnn"),
}


@pytest.mark.parametrize("name", ["mimic of the neck", "fgfi", "defeat", "pad of fgfi", "tadf of the neck"])
@pytest.mark.parametrize("pair", UNLIKE_PAIRS)
def test_a_teacher_of_another_kind_teaches_down_to_the_body(pair: str, name: str) -> None:
    (family, options), teacher_family = UNLIKE_PAIRS[pair]
    student, teacher = (
        random_detector(family, **options),
        random_detector(teacher_family, seed=1, neck_channels=64).eval(),
    )
    loss, data = IMITATIONS[name].build(student=student.spec, teacher=teacher.spec), padded_batch()
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=1e-3)
    for step in range(2):
        values = loss(student.view(data, seed=step), teacher.view(data, frozen=True, seed=0))
        assert values.keys() == loss.weights.keys()
        assert all(value.isfinite() for value in values.values())
        optimizer.zero_grad()
        sum(values.values()).backward()
        body = [parameter.grad for key, parameter in student.named_parameters() if "backbone.body" in key]
        assert all(gradient is None or gradient.isfinite().all() for gradient in body)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in body)
        optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_student_pools_its_regions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = random_detector("faster_rcnn"), random_detector("faster_rcnn", seed=1).eval()
    pool, calls = student.net.roi_heads.box_roi_pool, []
    forward = pool.forward
    monkeypatch.setattr(pool, "forward", lambda *args: calls.append(1) or forward(*args))
    data = padded_batch()
    view = student.view(data)
    _ = view.losses
    loss = Mimic(student.spec, teacher.spec)
    torch.stack(list(loss(view, teacher.view(data, frozen=True, seed=0)).values())).sum().backward()
    assert calls == [1]
