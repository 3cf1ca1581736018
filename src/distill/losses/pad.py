"""PAD: any squared-error imitation, each of its cells or regions weighted by how well the student can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.base import DistillLoss
from distill.losses.imitation import MapImitation, RegionErrors
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

EPSILON = 1e-6
WRAP = (
    "Wrap a loss with a weight on squared errors of maps or regions (Mimic, FGFI, DeFeat, DSIG's nodes or neck, the neck of "
    "TADF or Global Knowledge, Chen's hint with distance=l2, SSIM with error=l2), or leave PAD out"
)


def reweighed(error: Tensor, v: Tensor) -> Tensor:
    """error / (eps + exp(v)) + v, of any shape; v is the logarithm of a variance."""
    # As an exponential of a logarithm, so that neither the value nor its gradient is inf / inf for a large v.
    variance = torch.logaddexp(v, v.new_full((), math.log(EPSILON)))
    return error * (-variance).exp() + v


class Variance(nn.Module):
    """A log-variance per cell, or their mean per region, from the student's feature by a 1x1 convolution: starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.zeros(1))
        self.on = 1.0
        """0 while v is to count as 0; a factor, which leaves the branch attached, as other processes and the optimiser want it."""

    def forward(self, feature: Tensor, error: Tensor) -> Tensor:
        """Feature (B, C, H, W) and error (B, H, W), or (R, C, h, w) and (R,) -> the error that counts."""
        # In float32: an exponential of this follows.
        with torch.autocast(feature.device.type, enabled=False):
            x = upcast(feature)
            v = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))[:, 0]
            return reweighed(error, self.on * (v if error.ndim == 3 else v.mean((1, 2))))


class PAD(DistillLoss):
    """Weigh each cell or region of another loss by a variance that is learned from the student's feature there.

    ::

        e -> e / (eps + exp(v)) + v          e the mean squared error of a cell or region, eps = 1e-6

    so what the student cannot imitate counts less, and the term + v keeps the variance from growing. The terms, their
    masks, sums and weights are those of the wrapped loss; at the start v = 0, which is the wrapped loss itself, but for
    eps. Terms can fall below 0.

    Source: Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, arXiv 2008.01458, second-hand: by the loss for
    classification in torchdistill, which follows code of the authors and has a variance per sample and dimension.

    Where we differ: v is one number per cell of a map, or per region (the mean over its cells), by a 1x1 convolution
    without normalisation. How the authors wired it to a detector was never released; DeFeat's paper says that each
    distilled region was weighed. Factors (1/2, the number of channels) are the wrapped loss's own. Terms that compare
    neither maps nor regions by themselves (logits, boxes, the edges of DSIG's graph) stay as they are.

    Shapes: as the wrapped loss has them. The paper's weight is that of the plain loss.

    Args:
        student, teacher: specs of both detectors.
        of: makes the wrapped loss: ``of(student=..., teacher=...)``, such as ``partial(FGFI, neck=...)``.
        warmup: epochs at the start with v = 0: the plain loss, which the paper trains first in a stage of its own. An
            epoch that has begun ends so.

    Raises:
        DistillError: the wrapped loss's own; or it compares no maps or regions, or maps by other than the squared error.
    """

    def __init__(
        self, student: DetectorSpec, teacher: DetectorSpec, of: Callable[..., DistillLoss], warmup: float = 0.0
    ) -> None:
        if not callable(of):
            raise DistillError(
                f"PAD.of: expected what makes a loss, got a {type(of).__name__}. In YAML give `of` a _target_ and "
                "_partial_: true"
            )
        if not (isinstance(warmup, (int, float)) and 0 <= warmup < math.inf):
            raise DistillError(f"PAD.warmup: expected a number of epochs, 0 or more, got {warmup}")
        wrapped = of(student=student, teacher=teacher)
        super().__init__(wrapped.weights)
        self.ramp, self.normalizer, self.seed = wrapped.ramp, wrapped.normalizer, wrapped.seed
        self.supervised, self.warmup = wrapped.supervised, warmup
        self.of, self.needs_teacher = wrapped, wrapped.needs_teacher
        found = [part for part in wrapped.modules() if isinstance(part, (MapImitation, RegionErrors))]
        if wrapped.weights and not found:
            raise DistillError(
                f"PAD.of: expected a loss that compares feature maps or pooled regions, got {type(wrapped).__name__} "
                f"with {list(wrapped.weights)}. {WRAP}"
            )
        for part in found:
            _give_variance(type(wrapped).__name__, part)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The wrapped loss's terms."""
        on = float(self.epoch >= self.warmup)  # now, for a run that goes on inside an epoch was not told of its start
        for part in self.modules():
            if isinstance(part, Variance):
                part.on = on
        values: dict[str, Tensor] = self.of(student, teacher)
        return values

    def factor(self, term: str, progress: float, epochs: float) -> float:
        """The wrapped loss's own."""
        factor: float = self.of.factor(term, progress, epochs)
        return factor

    def identity(self) -> dict[str, Any] | None:
        """Of the wrapped loss's guest."""
        identity: dict[str, Any] | None = self.of.identity()
        return identity

    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Tell the wrapped loss."""
        super().on_epoch_start(epoch, data, student, teacher)
        self.of.on_epoch_start(epoch, data, student, teacher)


def _give_variance(name: str, part: MapImitation | RegionErrors) -> None:
    if part.reweigh is not None:
        raise DistillError(f"PAD.of: {name}'s {part.place} is weighed already. Wrap the plain loss")
    if isinstance(part, RegionErrors):
        part.reweigh = Variance(part.channels)
        return
    if not part.squared:
        raise DistillError(
            f"PAD.of: expected squared errors, but {name} compares the {part.place} by another measure. {WRAP}"
        )
    part.reweigh = nn.ModuleDict({str(level): Variance(part.channels[level]) for level in part.levels})
