"""Learning rate and parameter groups against hand-worked values and torch's own schedulers."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from distill.training.schedule import Schedule
from distill.types import DistillError


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def rates(schedule: Schedule, steps: int, batch: int = 16) -> list[float]:
    optimizer, scheduler = schedule.build_optimizer(model(), nn.ModuleDict(), steps, batch)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_step_drops_after_the_named_epochs() -> None:
    schedule = Schedule(epochs=12, milestones=(8, 11), warmup_steps=0)
    found = rates(schedule, steps=120)
    expected = [0.02] * 80 + [0.002] * 30 + [0.0002] * 10
    assert found == pytest.approx(expected, rel=1e-9)


def test_warmup_is_linear_from_its_factor() -> None:
    schedule = Schedule(epochs=1, shape="constant", warmup_steps=4, warmup_factor=0.1)
    assert rates(schedule, 6) == pytest.approx([0.02 * f for f in (0.1, 0.325, 0.55, 0.775, 1, 1)], rel=1e-9)


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD(model().parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(Schedule(shape="cosine", warmup_steps=0), 50) == pytest.approx(expected, rel=1e-6)


def test_one_cycle_follows_torch_to_within_a_step() -> None:
    optimizer = torch.optim.SGD(model().parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=1000, cycle_momentum=False, final_div_factor=1e9
    )
    expected = []
    for _ in range(1000):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # torch stretches its curve over steps - 1, which shifts it by at most one step
    assert rates(Schedule(shape="one_cycle", warmup_steps=0), 1000) == pytest.approx(expected, abs=0.02 * 0.006)


def test_flat_cosine_is_a_cosine_behind_its_flat_part() -> None:
    schedule = Schedule(epochs=1, shape="flat_cosine", flat=0.6, warmup_steps=0)
    found = rates(schedule, steps=10)
    assert found[:7] == pytest.approx([0.02] * 7, rel=1e-9)
    assert found[7:] == pytest.approx([0.02 * (0.5 + 0.5 * math.cos(math.pi * k / 4)) for k in (1, 2, 3)], rel=1e-9)


def test_the_backbone_has_its_own_rate() -> None:
    student: Any = model()
    student.body = student[0]
    schedule = Schedule(optimizer=partial(torch.optim.SGD, lr=0.02), backbone_rate=0.1, warmup_steps=0)
    optimizer, _ = schedule.build_optimizer(student, nn.ModuleDict(), 10, 16)
    found = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found == {
        id(p): pytest.approx(0.002 if name.startswith("0.") else 0.02) for name, p in student.named_parameters()
    }


def test_rate_scales_with_the_total_batch() -> None:
    base = rates(Schedule(warmup_steps=0, base_batch=16), 4, batch=16)
    assert rates(Schedule(warmup_steps=0, base_batch=16), 4, batch=4) == pytest.approx([rate / 4 for rate in base])


def test_norms_and_biases_are_spared_decay_and_adapters_have_their_rate() -> None:
    student, adapters = model(), nn.ModuleDict({"a": nn.Conv2d(2, 2, 1)})
    schedule = Schedule(
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
        decay_norms=False,
        adapter_rate=10,
        warmup_steps=0,
    )
    optimizer, _ = schedule.build_optimizer(student, adapters, 10, 16)
    found = {
        id(p): (group["weight_decay"], group["initial_lr"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found[id(student[0].weight)] == (0.05, 1e-3)
    assert found[id(student[0].bias)] == found[id(student[1].weight)] == (0.0, 1e-3)
    assert found[id(adapters["a"].weight)] == (0.05, pytest.approx(1e-2))
    assert len(found) == len(list(student.parameters())) + len(list(adapters.parameters()))


def test_frozen_parameters_stay_out() -> None:
    student = model()
    student[0].requires_grad_(False)
    optimizer, _ = Schedule().build_optimizer(student, nn.ModuleDict(), 10, 16)
    assert not {id(p) for p in student[0].parameters()} & {id(p) for g in optimizer.param_groups for p in g["params"]}


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(
        DistillError,
        match=r"schedule.shape: expected one of step, cosine, one_cycle, flat_cosine, constant, got 'stpe'",
    ):
        Schedule(shape="stpe")
