"""The progress bar of a training on a terminal."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import rich
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Task, TextColumn
from rich.text import Text

from distill.training.callbacks.history import loss_sums
from distill.training.distiller import Distiller


class EpochColumn(TextColumn):
    """Lightning's caption of the bar, with epochs that count from 1."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """``Epoch 0/11`` becomes ``epoch 1/12``."""
        return Text(
            re.sub(
                r"^Epoch (\d+)(?:/(-?\d+))?",
                lambda match: f"epoch {int(match[1]) + 1}" + (f"/{int(match[2]) + 1}" if match[2] else ""),
                task.description,
            )
        )


class EpochProgressBar(RichProgressBar):
    """Lightning's bar with both sums of losses, on terminals and in notebooks only. Epochs count from 1.

    In a file each refresh would be a line.

    Args:
        refresh_rate: batches between two readings of the losses, which wait for the GPU.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._shown: dict[str, Any] = {}
        console = rich.get_console()
        if not (console.is_terminal or console.is_jupyter):
            self.disable()

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Replace Lightning's caption."""
        return [EpochColumn(), *super().configure_columns(trainer)[1:]]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Detection and distillation sums of the last batch."""
        assert isinstance(pl_module, Distiller)
        losses = pl_module.last_batch.losses
        if losses and (not self._shown or trainer.fit_loop.batch_idx % max(1, int(self.refresh_rate)) == 0):
            values = torch.stack(list(losses.values())).tolist()
            sums = loss_sums({f"loss/{name}": value for name, value in zip(losses, values, strict=True)})
            self._shown = {name.removeprefix("loss/"): value for name, value in sums.items()}
        return self._shown
