"""A moving average of the student's weights."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging

from distill.training.distiller import Distiller
from distill.training.lightning_compat import leave_out_of_average


class WeightAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, without the steps that were skipped.

    ``average = decay * average + (1 - decay) * weights`` after each optimizer step that changed the weights; the first
    update copies the weights. The average is evaluated, saved as the best checkpoint and exported. Training continues
    with the weights, not with the average.

    Args:
        decay: factor of the previous average in an update.
        update_every_n_steps: optimizer steps between two updates.
        use_buffers: average the running statistics too; otherwise they are copied.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1, use_buffers: bool = True) -> None:
        super().__init__(decay=decay, update_every_n_steps=update_every_n_steps, use_buffers=use_buffers)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, unless the guard or the loss scaler skipped the step."""
        assert isinstance(pl_module, Distiller)
        if pl_module.guard.skipping:
            leave_out_of_average(self, trainer.global_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
