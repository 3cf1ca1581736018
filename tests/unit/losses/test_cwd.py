"""CWD: the divergence of each channel by loops, on the neck and on dense class logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.cwd import CWD, channel_divergence
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid


def slow_divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """tau^2 / (N C) sum KL(p_T || p_S)."""
    total = 0.0
    for s, t in zip(student.flatten(0, 1).flatten(1).tolist(), teacher.flatten(0, 1).flatten(1).tolist(), strict=True):
        log_s = math.log(sum(math.exp(v / temperature) for v in s))
        log_t = math.log(sum(math.exp(v / temperature) for v in t))
        for a, b in zip(s, t, strict=True):
            log_p = b / temperature - log_t
            total += math.exp(log_p) * (log_p - (a / temperature - log_s))
    return temperature**2 * total / (student.shape[0] * student.shape[1])


class TestCWD(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return CWD(student, teacher, neck={"levels": None}, temperature=2.0)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return CWD(student, teacher, adapter={"kernel": 1})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        return {"neck.all": sum(slow_divergence(x, teacher.neck[at], 2.0) for at, x in student.neck.items())}


class TestDenseCWD(LossGrid):
    student = spec(two_stage=False, anchors=2)
    teacher = spec(two_stage=False, anchors=2)

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return CWD(student, teacher, logits={"classes": 5.0})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        levels = [4, 8, 16, 32]
        return {
            "neck.all": sum(slow_divergence(student.neck[at], teacher.neck[at], 1.0) for at in levels),
            "logits.classes": sum(
                slow_divergence(x, teacher.class_logits[at], 1.0) for at, x in student.class_logits.items()
            ),
        }


def test_the_teachers_other_classes_are_left_out() -> None:
    student_spec, teacher_spec = (spec(names, two_stage=False) for names in (("cat", "dog"), ("dog", "hen", "cat")))
    student, teacher = random_view(batch(OBJECTS), student_spec, 1), random_view(batch(OBJECTS), teacher_spec, 2)
    found = CWD(student_spec, teacher_spec, neck={"all": 0}, logits={"classes": 1})(student, teacher)
    chosen = [3 * anchor + column for anchor in range(3) for column in (2, 0)]
    expected = sum(
        slow_divergence(x, teacher.class_logits[at][:, chosen], 1.0) for at, x in student.class_logits.items()
    )
    assert found["logits.classes"].item() == pytest.approx(expected, rel=1e-10)
    assert "neck" not in student.reads | teacher.reads


def test_has_the_gradient_of_the_cross_entropy() -> None:
    """As in the other published code."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5).double().requires_grad_(), torch.randn(2, 3, 4, 5).double()
    channel_divergence(student, teacher, 3.0).sum().backward()
    entropy = -9 * ((teacher.flatten(2) / 3).softmax(2) * (student.flatten(2) / 3).log_softmax(2)).sum()
    (expected,) = torch.autograd.grad(entropy, student)
    torch.testing.assert_close(student.grad, expected)


def test_refusals() -> None:
    with pytest.raises(DistillError, match="temperature: expected a number above 0"):
        CWD(spec(), spec(), temperature=0)
    with pytest.raises(DistillError, match=r"has no class_logits\. Set the weights of logits to 0"):
        CWD(spec(), spec(), logits={"classes": 1})
