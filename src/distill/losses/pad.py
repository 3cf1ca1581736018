"""PAD: weigh each cell or region of any squared-error imitation by how well the student can imitate it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.base import DistillLoss, is_number
from distill.losses.imitation import MapImitation, RegionErrors
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

EPSILON = 1e-6
WRAP = (
    "Wrap a loss with a weight on squared errors of maps or regions (Mimic, FGFI, DeFeat, DSIG's nodes or neck, the "
    "neck of TADF or Global Knowledge, Chen's hint with distance=l2, SSIM with error=l2), or leave PAD out"
)


def reweighed(error: Tensor, v: Tensor) -> Tensor:
    """error / (eps + exp(v)) + v, for any shape; v is the logarithm of a variance."""
    # The exponential of a logarithm: for a large v neither the value nor its gradient becomes inf / inf.
    variance = torch.logaddexp(v, v.new_full((), math.log(EPSILON)))
    return error * (-variance).exp() + v


class Variance(nn.Module):
    """A log-variance per cell or its mean over a region, by a 1x1 convolution of the student's feature. Starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.zeros(1))
        self.on = 1.0
        """Factor on v, 0 during the warm-up. A factor keeps the branch attached, as DDP and the optimizer need."""

    def forward(self, feature: Tensor, error: Tensor) -> Tensor:
        """Feature (B, C, H, W) and error (B, H, W), or (R, C, h, w) and (R,) -> the weighted error."""
        # In float32, because an exponential follows.
        with torch.autocast(feature.device.type, enabled=False):
            x = upcast(feature)
            v = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))[:, 0]
            return reweighed(error, self.on * (v if error.ndim == 3 else v.mean((1, 2))))


class PAD(DistillLoss):
    """Weigh each cell or region of another loss by a variance that is learned from the student's feature there.

    ::

        e -> e / (eps + exp(v)) + v          e the mean squared error of a cell or region, eps = 1e-6

    Features that the student cannot imitate count less, and the term + v limits the variance. The terms, their masks,
    sums and weights are those of the wrapped loss. At the start v = 0, so PAD equals the wrapped loss up to eps. Terms
    can be negative.

    Source: Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, arXiv 2008.01458, second-hand: from the loss
    for classification in torchdistill, which follows code of the authors and has a variance per sample and dimension.

    Where we differ: v is one number per cell of a map, or per region (the mean over its cells), from a 1x1 convolution
    without normalization. The authors never released how PAD is connected to a detector; DeFeat's paper says that each
    distilled region was weighed. Factors (1/2, the number of channels) are those of the wrapped loss. Terms that
    compare neither single maps nor single regions (logits, boxes, the edges of DSIG's graph) are unchanged.

    Shapes: those of the wrapped loss. The paper's weight is that of the plain loss.

    Args:
        student, teacher: specs of both detectors.
        of: builds the wrapped loss: ``of(student=..., teacher=...)``, such as ``partial(FGFI, neck=...)``.
        warmup: number of epochs at the start with v = 0, the plain loss. The paper trains the plain loss first, in a
            separate stage. The warm-up ends with a whole epoch.

    Raises:
        DistillError: that of the wrapped loss; or the wrapped loss compares no maps or regions, or compares maps by
            another error than the squared one.
    """

    def __init__(
        self, student: DetectorSpec, teacher: DetectorSpec, of: Callable[..., DistillLoss], warmup: float = 0.0
    ) -> None:
        if not callable(of):
            raise DistillError(
                f"PAD.of: expected a function that builds a loss, got a {type(of).__name__}. In YAML give `of` a "
                "_target_ and _partial_: true"
            )
        if not is_number(warmup):
            raise DistillError(f"PAD.warmup: expected a number of epochs, 0 or more, got {warmup}")
        wrapped = of(student=student, teacher=teacher)
        super().__init__(wrapped.weights)
        self.ramp, self.normalizer, self.seed = wrapped.ramp, wrapped.normalizer, wrapped.seed
        self.supervised, self.warmup = wrapped.supervised, warmup
        self.of, self.needs_teacher = wrapped, wrapped.needs_teacher
        imitations = [part for part in wrapped.modules() if isinstance(part, (MapImitation, RegionErrors))]
        if wrapped.weights and not imitations:
            raise DistillError(
                f"PAD.of: expected a loss that compares feature maps or pooled regions, got {type(wrapped).__name__} "
                f"with {list(wrapped.weights)}. {WRAP}"
            )
        for imitation in imitations:
            _add_variance(type(wrapped).__name__, imitation)

    @property
    def truth_terms(self) -> list[str]:
        """Those of the wrapped loss."""
        terms: list[str] = self.of.truth_terms
        return terms

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of the wrapped loss."""
        # Set here and not in `on_epoch_start`, which a run that resumes inside an epoch does not call.
        on = float(self.epoch >= self.warmup)
        for part in self.modules():
            if isinstance(part, Variance):
                part.on = on
        values: dict[str, Tensor] = self.of(student, teacher)
        return values

    def factor(self, term: str, progress: float, epochs: float) -> float:
        """The factor of the wrapped loss."""
        factor: float = self.of.factor(term, progress, epochs)
        return factor

    def identity(self) -> dict[str, Any] | None:
        """The identity of the wrapped loss's frozen model."""
        identity: dict[str, Any] | None = self.of.identity()
        return identity

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Call the wrapped loss's hook too."""
        super().on_epoch_start(epoch, data, student, teacher)
        self.of.on_epoch_start(epoch, data, student, teacher)


def _add_variance(name: str, part: MapImitation | RegionErrors) -> None:
    if part.reweigh is not None:
        raise DistillError(f"PAD.of: {name}'s {part.place} is already weighed. Wrap the plain loss")
    if isinstance(part, RegionErrors):
        part.reweigh = Variance(part.channels)
        return
    if not part.squared:
        raise DistillError(
            f"PAD.of: expected squared errors, but {name} compares the {part.place} by another error. {WRAP}"
        )
    part.reweigh = nn.ModuleDict({str(level): Variance(part.channels[level]) for level in part.levels})
