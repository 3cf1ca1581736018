"""FitNets' hint and attention transfer: their equations, cell by cell."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill.losses.at import AT
from distill.losses.base import DistillLoss
from distill.losses.hint import Hint
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid


class TestHint(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Hint(student, teacher, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Hint(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        errors = {
            at: zip(x.flatten().tolist(), teacher.neck[at].flatten().tolist(), strict=True)
            for at, x in student.neck.items()
        }
        return {"neck.all": sum(sum((a - b) ** 2 for a, b in e) / student.neck[at].numel() for at, e in errors.items())}


class TestAT(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return AT(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        value = 0.0
        for at, x in student.neck.items():
            for pair in zip(x, teacher.neck[at], strict=True):
                q = [[sum(v * v for v in cell) / 6 for cell in one.flatten(1).T.tolist()] for one in pair]
                s, t = ([v / math.sqrt(sum(w * w for w in row)) for v in row] for row in q)
                value += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s) / len(x)
        return {"neck.all": value}


def test_attention_takes_unequal_channels_and_any_power() -> None:
    wide = replace(spec(), neck=dict.fromkeys(spec().neck, 8))
    student, teacher = random_view(batch(OBJECTS), spec(), 1), random_view(batch(OBJECTS), wide, 2)
    values = AT(spec(), wide, neck={"levels": [8]}, power=3)(student, teacher)
    q, p = (view.neck[8].abs().pow(3).mean(1).flatten(1) for view in (student, teacher))
    expected = (q / q.norm(dim=1, keepdim=True) - p / p.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(values["neck.all"], expected)
    with pytest.raises(DistillError, match="power: expected"):
        AT(spec(), wide, power=0)


def test_normalizations_of_the_hint() -> None:
    student, teacher = random_view(batch(OBJECTS), spec(), 1), random_view(batch(OBJECTS), spec(), 2)
    mse, half, norm = (
        Hint(spec(), spec(), neck={"levels": 1, "normalization": name}, adapter={"kernel": None})(student, teacher)
        for name in ("mse", "half_mse", "half_l2")
    )
    assert mse["neck.all"].item() == pytest.approx(2 * half["neck.all"].item())
    assert norm["neck.all"].item() == pytest.approx(6 * half["neck.all"].item())
    with pytest.raises(DistillError, match=r"neck\.normalization: expected"):
        Hint(spec(), spec(), neck={"normalization": "l1"})
