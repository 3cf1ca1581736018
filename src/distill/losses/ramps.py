"""Ramps: how the weight of a distillation loss changes during training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.types import DistillError

SHAPES = ("constant", "linear", "cosine", "peak")


@dataclass(frozen=True)
class Ramp:
    """Factor on the weights of one distillation loss, as a function of p, the finished fraction of training (0 to 1).

    * ``constant``: 1
    * ``linear``: 1 - p
    * ``cosine``: 0.5 cos(pi p) + 0.5
    * ``peak``: linear from 0 to 1 at p = 1/4, then linear to 0

    Source: the multipliers of DeFeat (Guo et al., CVPR 2021), which change once per epoch; here the factor changes with
    each step. The lines of ``peak`` are our reading of the description "up, then down, highest at a quarter".

    Args:
        shape: one of the above.
        warmup: number of epochs at the start over which the factor also rises linearly from 0.
        stop: number of epochs at the end with a factor of 0.
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
        """Factor in [0, 1] at the fraction `progress` of `epochs` epochs."""
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
