"""Warnings about a schedule that does not fit the length or the loss of its run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.training.callbacks import schedule_check
from distill.training.callbacks.schedule_check import ScheduleCheck
from distill.training.distiller import Distiller
from distill.training.schedule import Schedule


class FakeDistiller(Distiller):
    def __init__(self, **options: Any) -> None:
        self.__dict__.update(_step=0, _schedule=Schedule(**options), _device=torch.device("cpu"))

    schedule = property(lambda self: self._schedule)  # type: ignore[assignment]
    device = property(lambda self: self._device)
    progress = property(lambda self: self.__dict__["part"])  # type: ignore[assignment]


def messages(losses: list[float], monkeypatch: pytest.MonkeyPatch, planned: int | None = None, **options: Any) -> str:
    """The warnings of a run with these losses of its steps."""
    caught: list[str] = []
    monkeypatch.setattr(schedule_check, "rank_zero_warn", caught.append)
    module, check = FakeDistiller(**options), ScheduleCheck()
    steps = planned or len(losses)
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, interrupted=False)
    check.on_train_start(trainer, module)
    for step, loss in enumerate(losses):
        module.__dict__["part"] = (step + 1) / steps
        check.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, step)
    check.on_train_end(trainer, module)
    return " / ".join(caught)


def test_a_loss_that_still_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 to 0 on a line: 0.3 on average over the fifth before the last, then 0.1."""
    said = messages([1 - step / 200 for step in range(200)], monkeypatch, warmup_steps=0, epochs=7)
    assert "by 66 %" in said
    assert "schedule.epochs=14" in said


@pytest.mark.parametrize("losses", [[1.0] * 200, [1 / (1 + step) for step in range(400)], [1.0, 0.5] * 20])
def test_a_loss_that_has_settled_or_a_short_run(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "by" if len(losses) == 400 else ""
    said = messages(losses, monkeypatch, warmup_steps=0)
    assert (expected in said) if expected else said == ""


def test_a_run_that_was_stopped_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert messages([1 - step / 200 for step in range(150)], monkeypatch, planned=200, warmup_steps=0) == ""


def test_losses_that_are_not_finite_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [1.0] * 200
    losses[150] = float("nan")
    assert messages(losses, monkeypatch, warmup_steps=0) == ""


def test_a_warm_up_longer_than_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "schedule.warmup_steps=500, but the run has 360 steps" in messages([1.0] * 360, monkeypatch)
    assert messages([1.0] * 360, monkeypatch, warmup_steps=18) == ""
