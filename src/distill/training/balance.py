"""Weights of the distillation methods from gradients: each method gets a share of the detection loss's gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from distill import distributed
from distill.training.gradients import neck_gradient_norms
from distill.types import DistillError, View

DETECTION = "detection"
"""Name of the student's own losses among the measured norms."""
LARGEST_FACTOR = 1000.0
"""Highest fixed factor of a method. A term that is nearly 0 in the measured steps would get an arbitrary one."""


class GradientBalance:
    """Scales each method's weights so that its gradient is `share` times as large as that of the detection loss.

    A method's weights are multiplied by one factor::

        factor = share * sum of |g_detection| / sum of |g_method|

    ``|g|`` is the norm of a loss's gradient at the student's neck (`neck_gradient_norms`): of the sum of the student's
    own weighted losses, and of the sum of the method's weighted terms, with a ramp of 1. The sums run over the measured
    batches of all processes. The proportions of a method's own terms stay as they are configured, and its ramp
    multiplies the balanced weights.

    In each of the first `steps` optimizer steps, the batch is measured before its loss is computed, and the factor is
    that of all batches so far, this one included, but at most 1. After these steps, the factors are fixed, and may be
    above 1. Configured weights may be wrong for this data by orders of magnitude: too large ones never act, and too
    small ones only in the measured steps. Adapters are trained from the first step on. A measurement costs one backward
    pass per method from the loss to the neck.

    A fixed factor is at most 1000. A method whose gradient at the neck is 0, because an adapter starts at zero or
    because the batches have nothing for it, has a factor of 1 until its gradient is not 0. A batch whose norms are not
    finite is not counted. Images without labels are not measured. A student without a feature pyramid is measured at
    its body.

    The rule is ours. GradNorm (Chen et al., ICML 2018, arXiv 1711.02257) balances gradients in every step by a loss of
    its own.

    Args:
        share: norm of a method's gradient, relative to that of the detection loss. A number for each method, or method
            -> number.
        steps: number of optimizer steps that are measured.

    Raises:
        DistillError: a share that is not above 0, or fewer than one step.
    """

    def __init__(self, share: float | Mapping[str, float] = 2.0, steps: int = 50) -> None:
        given = share.values() if isinstance(share, Mapping) else [share]
        if not all(_is_share(value) for value in given) or not given:
            raise DistillError(
                "distill.balance_share: expected a number above 0, for each method or as {METHOD: NUMBER}, got "
                f"{dict(share) if isinstance(share, Mapping) else share}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise DistillError(f"distill.balance_steps: expected a whole number from 1, got {steps}")
        self.share, self.steps = share, steps
        self.finished_steps = 0
        """Optimizer steps that were measured."""
        self.norms: dict[str, float] = {}
        """Summed norms of the measured batches, of `DETECTION` and of each method."""

    @property
    def is_fixed(self) -> bool:
        """Whether all steps were measured."""
        return self.finished_steps >= self.steps

    def require_methods(self, methods: Sequence[str]) -> None:
        """Refuse shares by name that are not those of the methods.

        Raises:
            DistillError: a share is missing, or names no method.
        """
        if isinstance(self.share, Mapping) and set(self.share) != set(methods):
            raise DistillError(
                f"distill.balance_share: expected a share for each of {', '.join(methods) or 'no method'}, got "
                f"{dict(self.share)}"
            )

    def factor(self, method: str) -> float:
        """The factor on the weights of a method, by the batches measured so far."""
        detection, norm = self.norms.get(DETECTION, 0.0), self.norms.get(method, 0.0)
        if not detection or not norm:
            return 1.0
        share = self.share[method] if isinstance(self.share, Mapping) else self.share
        return min(LARGEST_FACTOR if self.is_fixed else 1.0, share * detection / norm)

    def factors(self, methods: Sequence[str]) -> dict[str, float]:
        """Method -> factor."""
        return {method: self.factor(method) for method in methods}

    def measure(self, student: View, detection: Tensor, methods: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add the norms of a batch. Every process must call this method. The gradients of the weights do not change.

        Args:
            student: the student's View of the batch.
            detection: sum of the student's own weighted losses, attached to the graph.
            methods: sums of each method's weighted terms, without ramp and without factor.
            scale: loss scale of fp16.
        """
        losses = {DETECTION: detection, **methods}
        measured = neck_gradient_norms(student, losses, dict.fromkeys(losses, 1.0), scale)
        norms: list[float] = distributed.sum_over_ranks(torch.stack(list(measured.values())))[0].tolist()
        if all(math.isfinite(norm) for norm in norms):
            for name, norm in zip(measured, norms, strict=True):
                self.norms[name] = self.norms.get(name, 0.0) + norm

    def warn_of_short_training(self, steps: int) -> None:
        """Warn if a training of this many optimizer steps ends before the factors are fixed."""
        if steps < self.steps:
            rank_zero_warn(
                f"distill.balance=gradient: the training has {steps} steps, fewer than distill.balance_steps="
                f"{self.steps}, so the factors are never fixed, and never above 1. Set distill.balance_steps to a "
                "tenth of the steps"
            )

    def end_step(self, methods: Sequence[str]) -> None:
        """Count a measured optimizer step. After the last one, warn of methods that are not balanced."""
        self.finished_steps += 1
        if self.is_fixed:
            for problem in self._problems(methods):
                rank_zero_warn(f"distill.balance=gradient: {problem}")

    def _problems(self, methods: Sequence[str]) -> list[str]:
        if not self.norms.get(DETECTION):
            return [
                f"the detection loss had no finite gradient at the student's neck in {self.steps} steps, so all "
                "weights stay as configured. Check the weights in supervised"
            ]
        problems = []
        for method in methods:
            if not self.norms.get(method):
                problems.append(
                    f"{method} had no gradient at the student's neck in {self.steps} steps, so its weights stay as "
                    "configured. Its terms may compare the backbone only, or have nothing to compare in these "
                    f"batches; callbacks.terms reports terms without effect. Raise distill.balance_steps, or set the "
                    f"weights of distill.losses.{method} yourself"
                )
            elif self.factor(method) == LARGEST_FACTOR:
                problems.append(
                    f"the gradient of {method} at the student's neck is so small that its weights would have to be "
                    f"more than {LARGEST_FACTOR:g} times higher; they are {LARGEST_FACTOR:g} times higher. Set higher "
                    f"weights of distill.losses.{method}"
                )
        return problems

    def summary(self, methods: Sequence[str]) -> dict[str, Any]:
        """Share, measured steps and factors, in plain containers."""
        share = dict(self.share) if isinstance(self.share, Mapping) else self.share
        return {"share": share, "steps": self.finished_steps, "factors": self.factors(methods)}

    def state_dict(self) -> dict[str, Any]:
        """The measured norms, for a checkpoint."""
        return {"steps": self.finished_steps, "norms": dict(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the measured norms."""
        self.finished_steps, self.norms = state["steps"], dict(state["norms"])


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
