"""Ramps and learning-rate shapes against values worked by hand, and torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, MultiStepLR

from distill.losses.ramps import Ramp
from distill.training.schedule import cosine_decay, linear_warmup, step_decay
from distill.types import DistillError


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]),
        ("peak", [0, 1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_shapes_at_quarters(shape: str, values: list[float]) -> None:
    ramp = Ramp(shape)
    assert [ramp(quarter / 4, 12) for quarter in range(5)] == pytest.approx(values, abs=1e-15)
    assert [ramp(-0.1, 12), ramp(1.1, 12)] == pytest.approx([values[0], values[-1]])
    assert all(0 <= ramp(step / 1000, 12) <= 1 for step in range(1001))


def test_linear_and_cosine_equal_the_paper_s_epochs() -> None:
    for epoch in range(12):
        assert Ramp("linear")(epoch / 12, 12) == pytest.approx(1 - epoch / 12)
        assert Ramp("cosine")(epoch / 12, 12) == pytest.approx(0.5 * math.cos(math.pi * epoch / 12) + 0.5)


def test_warmup_and_off_count_epochs() -> None:
    ramp = Ramp(warmup=2, stop=3)
    assert [ramp(epoch / 12, 12) for epoch in (0, 1, 2, 8, 8.99, 9, 12)] == pytest.approx([0, 0.5, 1, 1, 1, 0, 0])
    assert Ramp(stop=0)(1.0, 12) == 1
    assert Ramp("linear", warmup=4)(1 / 12, 12) == pytest.approx(11 / 12 / 4)
    assert Ramp(stop=20)(0.0, 12) == 0


@pytest.mark.parametrize("options", [{"shape": "up"}, {"warmup": -1}, {"stop": -0.5}, {"warmup": math.nan}])
def test_refusals(options: dict[str, object]) -> None:
    with pytest.raises(DistillError, match="ramp"):
        Ramp(**options)  # type: ignore[arg-type]


def rates(make: object, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    assert isinstance(scheduler, LRScheduler)
    learning_rates = []
    for _ in range(steps):
        learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return learning_rates


def test_learning_rate_shapes_equal_torchs() -> None:
    pairs = [
        (lambda step: linear_warmup(step, 5, 0.001), lambda o: LinearLR(o, 0.001, 1.0, 5)),
        (lambda step: step_decay(step, [4, 7], 0.1), lambda o: MultiStepLR(o, [4, 7], 0.1)),
        (lambda step: cosine_decay(step, 10), lambda o: CosineAnnealingLR(o, 10)),
    ]
    for factor, factory in pairs:
        assert rates(lambda o, factor=factor: LambdaLR(o, factor), 10) == pytest.approx(rates(factory, 10), abs=1e-12)


def test_ends_of_the_learning_rate_shapes() -> None:
    assert linear_warmup(0, 0, 0.1) == 1
    assert linear_warmup(0, 200, 0.001) == 0.001
    assert linear_warmup(200, 200, 0.001) == 1
    assert step_decay(100, []) == 1
    assert cosine_decay(20, 10) == pytest.approx(0)
