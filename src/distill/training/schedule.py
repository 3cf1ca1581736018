"""How the weights move: optimiser, parameter groups, learning rate over the steps, and for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchvision.ops import FrozenBatchNorm2d

from distill.types import DistillError

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)
SHAPES = ("step", "cosine", "one_cycle", "constant")


@dataclass(frozen=True)
class Schedule:
    """Optimiser and learning rate of a run.

    The rate is ``lr * warmup * shape``: a linear warm-up over ``warmup_steps`` from ``warmup_factor``, and one of

    * ``step``: times ``gamma`` after each of ``milestones`` (epochs),
    * ``cosine``: half a cosine from 1 to 0,
    * ``one_cycle``: half a cosine up from 1/25 over the first 30 % of the steps, and one down to 0 (Smith 2018, as
      torch's ``OneCycleLR`` has it),
    * ``constant``.

    Args:
        epochs: passes over the training split.
        steps: optimiser steps at most; -1 for no limit.
        optimizer: called with parameter groups; gives the optimiser and its base rate.
        base_batch: scale the rate by (total batch / ``base_batch``), where the total counts processes and accumulation.
        decay_norms: whether weight decay applies to norms and biases as well.
        adapter_rate: rate of the distillation losses' own parameters relative to the student's.
        clip: L2 norm that the gradient is clipped to.
        accumulate: batches per optimiser step.
        evaluate_every: epochs between evaluations.

    Raises:
        DistillError: a value out of its range, or an optimiser that cannot be made: it is made once for show.
    """

    epochs: int = 12
    steps: int = -1
    optimizer: Callable[[Iterable[Any]], Optimizer] = field(
        default=partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-4)
    )
    shape: str = "step"
    milestones: Sequence[float] = (8, 11)
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    base_batch: int | None = None
    decay_norms: bool = True
    adapter_rate: float = 1.0
    clip: float | None = None
    accumulate: int = 1
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise DistillError(f"schedule.shape: expected one of {', '.join(SHAPES)}, got '{self.shape}'")
        if self.epochs < 1 or self.accumulate < 1 or self.evaluate_every < 1 or self.warmup_steps < 0:
            raise DistillError(
                f"schedule: epochs, accumulate and evaluate_every start at 1, warmup_steps at 0; got {self}"
            )
        ranges = {
            "steps": self.steps == -1 or self.steps >= 1,
            "gamma": 0 <= self.gamma < math.inf,
            "warmup_factor": 0 <= self.warmup_factor <= 1,
            "adapter_rate": 0 <= self.adapter_rate < math.inf,
            "clip": self.clip is None or self.clip > 0,
            "base_batch": self.base_batch is None or self.base_batch >= 1,
        }
        wrong = [f"{name}={getattr(self, name)}" for name, fine in ranges.items() if not fine]
        if wrong:
            raise DistillError(
                f"schedule: {', '.join(wrong)}: expected steps of -1 or from 1, gamma and adapter_rate from 0, warmup_factor "
                "in 0..1, clip above 0 or null, base_batch from 1 or null"
            )
        self._try()

    def _try(self) -> None:
        """Make the optimiser for a weight that does not count, so that a wrong argument is named before the first image."""
        groups = [{"params": [Parameter(torch.zeros(1))]} for _ in range(2)]
        try:
            made = self.optimizer(groups)
        except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise DistillError(f"schedule.optimizer: {error}. See the signature of that class") from error
        if not isinstance(made, Optimizer):
            raise DistillError(f"schedule.optimizer: expected a class of torch.optim, got {type(made).__name__}")
        odd = {
            name: value
            for name, value in made.defaults.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        if odd:
            raise DistillError(f"schedule.optimizer: expected finite numbers, got {odd}")

    def build_optimizer(
        self, student: nn.Module, adapters: nn.Module, steps: int, batch: int
    ) -> tuple[Optimizer, LambdaLR]:
        """Optimiser and scheduler (stepped after each step) for ``steps`` steps at a total batch of ``batch``."""
        groups = [*self._groups(student, 1.0), *self._groups(adapters, self.adapter_rate)]
        optimizer = self.optimizer([{"params": group["params"]} for group in groups])
        scale = 1.0 if self.base_batch is None else batch / self.base_batch
        for ours, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] *= scale * ours["rate"]
            if not ours["decays"]:
                group["weight_decay"] = 0.0
        return optimizer, LambdaLR(optimizer, self.learning_rate_factor(steps))

    def learning_rate_factor(self, steps: int) -> Callable[[int], float]:
        """Multiplier of the base rate at each of ``steps`` steps."""
        total = max(1, steps)
        milestones = [round(milestone / self.epochs * total) for milestone in self.milestones]
        shapes: dict[str, Callable[[int], float]] = {
            "step": lambda step: step_decay(step, milestones, self.gamma),
            "cosine": lambda step: cosine_decay(step, total),
            "one_cycle": lambda step: one_cycle_factor(step, total),
            "constant": lambda step: 1.0,
        }
        shape = shapes[self.shape]
        return lambda step: linear_warmup(step, self.warmup_steps, self.warmup_factor) * shape(step)

    def _groups(self, module: nn.Module, rate: float) -> list[dict[str, Any]]:
        decaying: list[Parameter] = []
        plain: list[Parameter] = []
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad:
                    spared = not self.decay_norms and (isinstance(owner, NORMS) or name.endswith("bias"))
                    (plain if spared else decaying).append(parameter)
        return [
            {"params": params, "decays": decays, "rate": rate}
            for params, decays in ((_unique_parameters(decaying), True), (_unique_parameters(plain), False))
            if params
        ]


def _unique_parameters(parameters: Sequence[Parameter]) -> list[Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def use_channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions out with their channels last, in place; maps follow. Only rounding differs.

    A 1x1 weight lies so already, and is left alone: ``module.to(memory_format=...)`` would give it other strides than its
    gradient gets, by which torch's multi-tensor optimisers lose their fast path.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


# Factors of a base rate after `step` optimiser steps; multiply them for torch's LambdaLR.


def linear_warmup(step: int, steps: int, start: float) -> float:
    """Linearly from `start` to 1 over the first `steps` steps."""
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def step_decay(step: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """Times `gamma` from each of `milestones`, in steps, on."""
    return gamma ** sum(step >= milestone for milestone in milestones)


def cosine_decay(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0 over `steps` steps, 0 after them."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))


def one_cycle_factor(step: int, steps: int, rise: float = 0.3, start: float = 1 / 25) -> float:
    """Half a cosine from `start` up to 1 over the part `rise` of `steps` steps, then half a cosine down to 0.

    Source: Smith 2018, in the form of torch's ``OneCycleLR``.
    """
    up = round(rise * steps)
    if step < up:
        return start + (1 - start) * (1 - cosine_decay(step, up))
    return cosine_decay(step - up, steps - up)
