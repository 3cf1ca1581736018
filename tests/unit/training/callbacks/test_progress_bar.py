"""The progress bar: epochs from 1, and both sums of losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.progress import Task

from distill.training.callbacks.progress_bar import EpochColumn, EpochProgressBar
from distill.training.distiller import BatchLosses
from helpers.training import distiller


@pytest.mark.parametrize(
    ("lightning", "caption"), [("Epoch 0/11 ", "epoch 1/12 "), ("Epoch 4", "epoch 5"), ("Validation", "Validation")]
)
def test_epochs_count_from_1(lightning: str, caption: str) -> None:
    task: Any = SimpleNamespace(spec=Task, description=lightning)
    assert EpochColumn().render(task).plain == caption


def test_the_losses_are_read_at_the_interval_only() -> None:
    bar, module = EpochProgressBar(refresh_rate=2), distiller()
    shown = []
    for number in range(4):
        losses = {"student/a": torch.tensor(1.0 + number), "student/b": torch.tensor(1.0), "x/neck": torch.tensor(0.5)}
        module.last_batch = BatchLosses({}, losses, torch.tensor(0.0), {})
        trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(batch_idx=number))
        shown.append(bar.get_metrics(trainer, module))
    assert shown == [{"detection": value, "distillation": 0.5} for value in (2.0, 2.0, 4.0, 4.0)]


def test_a_file_gets_no_bar() -> None:
    assert EpochProgressBar().is_disabled
