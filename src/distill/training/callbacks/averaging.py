"""The student's weights averaged over the steps that were taken."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging

from distill.training.distiller import Distiller
from distill.training.lightning_compat import leave_out_of_average


class WeightAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, of which a step that was skipped is no part.

    ``average = decay * average + (1 - decay) * weights`` after each optimiser step that changed the weights; the first one
    only copies them. The average is evaluated, kept as the best and exported; training goes on with the weights themselves.

    Args:
        decay: share of the average that a step leaves.
        update_every_n_steps: optimiser steps between two updates.
        use_buffers: whether running statistics are averaged too; they are copied otherwise.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1, use_buffers: bool = True) -> None:
        super().__init__(decay=decay, update_every_n_steps=update_every_n_steps, use_buffers=use_buffers)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the step, unless the guard or the scaler skipped it."""
        assert isinstance(pl_module, Distiller)
        if pl_module.guard.skipping:
            leave_out_of_average(self, trainer.global_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
