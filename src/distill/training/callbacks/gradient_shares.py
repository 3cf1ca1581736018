"""Logs each term's share of the gradient at the student's neck."""

from __future__ import annotations

import math

import lightning as L
from torch import Tensor

from distill.training.distiller import Distiller
from distill.training.gradients import neck_gradient_norms, shares
from distill.types import DistillError, View


class GradientShares(L.Callback):
    """Measures, at an interval, which share of the gradient at the student's neck each weighted term has.

    The shares are logged as ``gradient/<loss>/<term>`` with the values of the step, so also in ``steps.csv``. A
    measurement costs one backward pass per term from the term to the neck, on the first batch of the step, see
    ``docs/performance.md``. It changes no weights and no random draws. Runs without distillation losses are not
    measured.

    Args:
        every: steps between two measurements, rounded up to steps that are logged (``trainer.log_every_n_steps``).

    Raises:
        DistillError: ``every`` below 1.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise DistillError(
                f"callbacks.gradients: expected every from 1, got {every}; callbacks.gradients=null switches it off"
            )
        self.every = every
        self._measured_step = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Register an observer, which gets the terms while their graph exists."""
        assert isinstance(pl_module, Distiller)
        module, logged = pl_module, trainer.log_every_n_steps  # type: ignore[attr-defined]
        interval = logged * math.ceil(self.every / logged) if logged else math.inf

        def observe(student: View, terms: dict[str, Tensor], weights: dict[str, float]) -> None:
            step = trainer.global_step + 1
            if module.losses and step % interval == 0 and step != self._measured_step:
                self._measured_step = step
                measured = shares(neck_gradient_norms(student, terms, weights, module.loss_scale))
                module.step_measurements = {f"gradient/{name}": share for name, share in measured.items()}

        self._observe = observe
        module.observers.append(observe)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the observer."""
        assert isinstance(pl_module, Distiller)
        pl_module.observers.remove(self._observe)
