"""The loss equals its equation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from my_method import MyLoss


def test_my_loss_is_its_equation() -> None:
    torch.manual_seed(0)
    shapes = {8: (2, 3, 8, 8), 16: (2, 3, 4, 4)}
    student, teacher = ({stride: torch.randn(shape) for stride, shape in shapes.items()} for _ in range(2))
    spec = SimpleNamespace(neck={8: 3, 16: 3})
    value = MyLoss(spec, spec)(SimpleNamespace(neck=student), SimpleNamespace(neck=teacher))["neck.all"]
    pairs = [
        (s, t)
        for stride in shapes
        for s, t in zip(student[stride].flatten().tolist(), teacher[stride].flatten().tolist(), strict=True)
    ]
    assert float(value) == pytest.approx(sum(abs(s - t) for s, t in pairs) / len(pairs), rel=1e-5)


def test_equal_maps_give_zero() -> None:
    maps = SimpleNamespace(neck={8: torch.ones(1, 3, 2, 2)})
    spec = SimpleNamespace(neck={8: 3})
    assert float(MyLoss(spec, spec)(maps, maps)["neck.all"]) == 0.0
