"""Warns of a warm-up that is longer than the run, and of a run that ends while its loss still falls."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from distill.training.distiller import Distiller

PARTS = 10
"""The loss is averaged over this number of equal parts of the run."""
LEAST_STEPS = 5 * PARTS
"""Shorter runs have too few steps for an average."""


class ScheduleCheck(L.Callback):
    """Compares the schedule with the length and the loss of the run.

    Args:
        fall: warn if the mean loss of the last fifth of the run is lower than that of the fifth before by more than
            this part. A longer run would then probably give a better student.
    """

    def __init__(self, fall: float = 0.15) -> None:
        self.fall = fall
        self._sums = torch.zeros(2, PARTS)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the warm-up with the number of steps."""
        assert isinstance(pl_module, Distiller)
        self._sums = torch.zeros(2, PARTS, device=pl_module.device)
        steps = int(trainer.estimated_stepping_batches)
        if message := pl_module.schedule.warmup_fault(steps):
            rank_zero_warn(message)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Add the loss to the sum of its part of the run, on the device."""
        assert isinstance(pl_module, Distiller)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        part = min(PARTS - 1, int(PARTS * pl_module.progress))
        self._sums[:, part] += torch.stack([loss.detach().float().nan_to_num(0, 0, 0), torch.ones_like(loss).float()])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the last two fifths of a run that has finished its schedule."""
        assert isinstance(pl_module, Distiller)
        sums, counts = self._sums.cpu()
        if trainer.interrupted or pl_module.progress < 1 or counts.sum() < LEAST_STEPS or not counts[-4:].all():
            return
        before, last = (sums[part].sum() / counts[part].sum() for part in (slice(-4, -2), slice(-2, None)))
        if before > 0 and last < (1 - self.fall) * before:
            rank_zero_warn(
                f"the run ends while its loss still falls: by {100 * (1 - last / before):.0f} % over the last fifth of "
                f"its steps. A longer run may give a better student: schedule.epochs={2 * pl_module.schedule.epochs}"
            )
