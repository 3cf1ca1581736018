"""Stores the configuration in every checkpoint, so that a resume can compare it with its own."""

from __future__ import annotations

from typing import Any

import lightning as L

from distill.types import DistillError

KEY = "made_by"


class Provenance(L.Callback):
    """Adds the configuration and the number of processes to every checkpoint.

    Args:
        config: resolved, in plain containers.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add configuration and number of processes."""
        checkpoint[KEY] = {"config": self.config, "processes": trainer.world_size}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse another number of processes: the batch of a step would change."""
        before = checkpoint.get(KEY, {}).get("processes", trainer.world_size)
        if before != trainer.world_size:
            raise DistillError(
                f"resume: the run had {before} processes, this one has {trainer.world_size}, so the batch of a step "
                "would differ. Set trainer.devices and trainer.num_nodes as they were, or resume with resume=anyway"
            )
