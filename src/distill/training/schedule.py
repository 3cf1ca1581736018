"""The training schedule: optimizer, parameter groups, learning rate at each step, and length of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
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
SHAPES = ("step", "cosine", "one_cycle", "flat_cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Optimizer and learning rate of a run.

    The learning rate is `lr * warmup * shape`. `warmup` rises linearly from `warmup_factor` to 1 over `warmup_steps`.
    `shape` is one of

    * `step`: times `gamma` after each of `milestones`,
    * `cosine`: half a cosine from 1 to 0,
    * `one_cycle`: half a cosine from 1/25 up to 1 over the first 30 % of the steps, then half a cosine down to 0 (Smith
      2018, in the form of torch's `OneCycleLR`),
    * `flat_cosine`: 1 for the first `flat` of the steps, then half a cosine down to 0,
    * `constant`.

    Args:
        epochs: passes over the training split.
        steps: largest number of optimizer steps; -1 for no limit.
        optimizer: called with parameter groups, returns the optimizer, which has the base learning rate.
        shape: shape of the learning rate after the warm-up.
        milestones: epochs after which `step` multiplies the learning rate by `gamma`.
        gamma: factor of `step`, 0 or more.
        flat: share of the steps before the descent of `flat_cosine`, from 0 to below 1.
        warmup_steps: length of the warm-up in optimizer steps.
        warmup_factor: factor of the learning rate at the first step of the warm-up, in [0, 1].
        base_batch: the learning rate is multiplied by (total batch / `base_batch`), where the total batch includes all
            processes and accumulated batches; None for no scaling.
        decay_norms: whether weight decay applies to norms and biases too.
        backbone_rate: learning rate of the backbone's body, relative to that of the other layers.
        adapter_rate: learning rate of the distillation losses' own parameters, relative to that of the student.
        clip: L2 norm that the gradient is clipped to; None for no clipping.
        accumulate: batches per optimizer step.
        evaluate_every: epochs between evaluations.

    Raises:
        DistillError: a value is out of its range, or `optimizer` cannot be called. It is called once to find out.
    """

    epochs: int = 12
    steps: int = -1
    optimizer: Callable[[Iterable[Any]], Optimizer] = field(
        default=partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-4)
    )
    shape: str = "step"
    milestones: Sequence[float] = (8, 11)
    gamma: float = 0.1
    flat: float = 0.5
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    base_batch: int | None = None
    decay_norms: bool = True
    backbone_rate: float = 1.0
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
            "flat": 0 <= self.flat < 1,
            "backbone_rate": 0 <= self.backbone_rate < math.inf,
            "adapter_rate": 0 <= self.adapter_rate < math.inf,
            "clip": self.clip is None or self.clip > 0,
            "base_batch": self.base_batch is None or self.base_batch >= 1,
        }
        wrong = [f"{name}={getattr(self, name)}" for name, fine in ranges.items() if not fine]
        if wrong:
            raise DistillError(
                f"schedule: {', '.join(wrong)}: expected steps of -1 or from 1, gamma, backbone_rate and adapter_rate "
                "from 0, warmup_factor in 0..1, flat from 0 to below 1, clip above 0 or null, base_batch from 1 or null"
            )
        self._try()

    def _try(self) -> None:
        """Build the optimizer for a dummy parameter, to report invalid arguments before any data is read."""
        groups = [{"params": [Parameter(torch.zeros(1))]} for _ in range(2)]
        try:
            optimizer = self.optimizer(groups)
        except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise DistillError(f"schedule.optimizer: {error}. See the signature of that class") from error
        if not isinstance(optimizer, Optimizer):
            raise DistillError(f"schedule.optimizer: expected a class of torch.optim, got {type(optimizer).__name__}")
        not_finite = {
            name: value
            for name, value in optimizer.defaults.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        if not_finite:
            raise DistillError(f"schedule.optimizer: expected finite numbers, got {not_finite}")

    def build_optimizer(
        self, student: nn.Module, adapters: nn.Module, steps: int, batch: int
    ) -> tuple[Optimizer, LambdaLR]:
        """Build the optimizer and the learning rate scheduler. Call `scheduler.step()` after each optimizer step.

        Args:
            student: trained at the base learning rate; its `body`, if it has one, at this rate times `backbone_rate`.
            adapters: trained at the base learning rate times `adapter_rate`.
            steps: number of optimizer steps of the run.
            batch: total batch of a step, for `base_batch`.
        """
        backbone: Any = getattr(student, "body", None)
        body = set() if self.backbone_rate == 1 or backbone is None else set(backbone.parameters())
        groups = [
            *self._groups(student, 1.0, leave_out=body),
            *(self._groups(backbone, self.backbone_rate) if body else []),
            *self._groups(adapters, self.adapter_rate),
        ]
        optimizer = self.optimizer([{"params": group["params"]} for group in groups])
        scale = 1.0 if self.base_batch is None else batch / self.base_batch
        for options, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] *= scale * options["rate"]
            if not options["decays"]:
                group["weight_decay"] = 0.0
        return optimizer, LambdaLR(optimizer, self.learning_rate_factor(steps))

    def warmup_fault(self, steps: int) -> str | None:
        """Return a message if a run of `steps` steps ends before the warm-up does."""
        if self.warmup_steps < steps:
            return None
        return (
            f"schedule.warmup_steps={self.warmup_steps}, but the run has {steps} steps: it ends before the learning "
            f"rate has risen. Set schedule.warmup_steps={steps // 20}, or a longer schedule.epochs"
        )

    def learning_rate_factor(self, steps: int) -> Callable[[int], float]:
        """Return the function from a step to the factor of the base learning rate, for a run of `steps` steps."""
        total = max(1, steps)
        milestones = [round(milestone / self.epochs * total) for milestone in self.milestones]
        shapes: dict[str, Callable[[int], float]] = {
            "step": lambda step: step_decay(step, milestones, self.gamma),
            "cosine": lambda step: cosine_decay(step, total),
            "one_cycle": lambda step: one_cycle_factor(step, total),
            "flat_cosine": lambda step: flat_cosine_factor(step, total, self.flat),
            "constant": lambda step: 1.0,
        }
        shape = shapes[self.shape]
        return lambda step: linear_warmup(step, self.warmup_steps, self.warmup_factor) * shape(step)

    def _groups(self, module: Any, rate: float, leave_out: Collection[Parameter] = ()) -> list[dict[str, Any]]:
        decaying: list[Parameter] = []
        plain: list[Parameter] = []
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in leave_out:
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
    """Convert the weights of convolutions to the memory format channels-last, in place.

    The feature maps then use the same format. Results differ by rounding only. 1x1 weights already have this format and
    are not changed: `module.to(memory_format=...)` would give them other strides than their gradients have, and torch's
    multi-tensor optimizers would lose their fast path.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


# Factors of the base learning rate after `step` optimizer steps. torch's LambdaLR gets their product.


def linear_warmup(step: int, steps: int, start: float) -> float:
    """Return a factor that rises linearly from `start` to 1 over the first `steps` steps."""
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def step_decay(step: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """Return the product of one `gamma` for each of `milestones`, in steps, that `step` has reached."""
    return gamma ** sum(step >= milestone for milestone in milestones)


def cosine_decay(step: int, steps: int) -> float:
    """Return half a cosine from 1 to 0 over `steps` steps, and 0 after them."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))


def one_cycle_factor(step: int, steps: int, rise: float = 0.3, start: float = 1 / 25) -> float:
    """Return half a cosine from `start` to 1 over the part `rise` of `steps` steps, then half a cosine down to 0.

    Source: Smith 2018, in the form of torch's `OneCycleLR`.
    """
    up = round(rise * steps)
    if step < up:
        return start + (1 - start) * (1 - cosine_decay(step, up))
    return cosine_decay(step - up, steps - up)


def flat_cosine_factor(step: int, steps: int, flat: float) -> float:
    """Return 1 over the part `flat` of `steps` steps, then half a cosine down to 0."""
    start = round(flat * steps)
    return 1.0 if step < start else cosine_decay(step - start, max(1, steps - start))
