"""How much over time: the ramp of a distillation loss's weight, and shapes of a learning rate. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill.types import DistillError

SHAPES = ("constant", "linear", "cosine", "peak")


@dataclass(frozen=True)
class Ramp:
    """Factor on all weights of one distillation loss, with p the part of the training that is done, from 0 to 1.

    * ``constant``: 1
    * ``linear``: 1 - p
    * ``cosine``: 0.5 cos(pi p) + 0.5
    * ``peak``: linearly up from 0 to 1 at p = 1/4, then linearly down to 0

    Source: the multipliers of DeFeat (Guo et al., CVPR 2021), which count whole epochs; here they move with each step.
    The lines of ``peak`` are our reading of its "up, then down, highest at a quarter".

    Args:
        shape: one of the above.
        warmup: epochs over which the factor also rises linearly from 0.
        stop: epochs at the end during which the factor is 0.
    """

    shape: str = "constant"
    warmup: float = 0.0
    stop: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise DistillError(f"ramp.shape: expected one of {', '.join(SHAPES)}, got '{self.shape}'")
        if not (0 <= self.warmup < math.inf and 0 <= self.stop < math.inf):
            raise DistillError(
                f"ramp: warmup and stop are numbers of epochs, 0 or more; got warmup={self.warmup}, stop={self.stop}"
            )

    def __call__(self, progress: float, epochs: float) -> float:
        """Factor in [0, 1] after the part `progress` of `epochs` epochs."""
        p = min(1.0, max(0.0, progress))
        if self.stop and p * epochs >= epochs - self.stop:
            return 0.0
        rise = min(1.0, p * epochs / self.warmup) if self.warmup else 1.0
        return rise * self._shape(p)

    def _shape(self, p: float) -> float:
        if self.shape == "linear":
            return 1 - p
        if self.shape == "cosine":
            return 0.5 * math.cos(math.pi * p) + 0.5
        if self.shape == "peak":
            return 4 * p if p < 0.25 else (1 - p) / 0.75
        return 1.0


# Factors of a base rate after `step` optimiser steps; multiply them for torch's LambdaLR.


def warmup(step: int, steps: int, start: float) -> float:
    """Linearly from `start` to 1 over the first `steps` steps."""
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def drops(step: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """Times `gamma` from each of `milestones`, in steps, on."""
    return gamma ** sum(step >= milestone for milestone in milestones)


def cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0 over `steps` steps, 0 after them."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))


def one_cycle(step: int, steps: int, rise: float = 0.3, start: float = 1 / 25) -> float:
    """Half a cosine from `start` up to 1 over the part `rise` of `steps` steps, then half a cosine down to 0.

    Source: Smith 2018, in the form of torch's ``OneCycleLR``.
    """
    up = round(rise * steps)
    if step < up:
        return start + (1 - start) * (1 - cosine(step, up))
    return cosine(step - up, steps - up)
