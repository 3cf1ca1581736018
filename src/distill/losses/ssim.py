"""SSIM distillation: make the student's maps similar in local luminance, contrast and structure, not cell by cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.losses import base, masks
from distill.losses.base import DistillLoss
from distill.losses.imitation import MapImitation, parts
from distill.losses.kernels.blocks import Block, by_autograd, in_blocks
from distill.losses.kernels.windows import Frame, ssim_block
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

ERRORS = ("ssim", "l1", "l2")
SCOPES: dict[str, tuple[int, ...]] = {"plane": (2, 3), "image": (1, 2, 3), "tensor": (0, 1, 2, 3), "none": ()}
"""Axes of (B, C, H, W) over which the smallest and the largest value are taken."""
FLAT = 1e-6
C1, C2, C3 = 0.01**2, 0.03**2, 0.03**2 / 2
"""(K1 L)^2, (K2 L)^2 and C2 / 2, for maps whose dynamic range L is 1."""

NECK = {"foreground": 4.0, "background": 0.0, "levels": None}
WINDOW = {"size": 11, "sigma": 1.5}
EXPONENTS = {"luminance": 1.0, "contrast": 1.0, "structure": 1.0}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}


def rescaled(x: Tensor, scope: str = "plane") -> Tensor:
    """(x - min) / (max - min + 1e-6) over a plane, an image or the whole tensor (B, C, H, W); ``none`` gives x itself.

    What is flatter than 1e-6 becomes 0 without a gradient, whose factor, 1 over that range, would leave nothing else.
    """
    if not (axes := SCOPES[scope]):
        return x
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    span = high - low
    # One factor a plane: dividing and masking whole maps, and back again, costs more than the comparison.
    return (x - low) * (1 / (span + FLAT)).masked_fill(span < FLAT, 0.0)


def gaussian(size: int = 11, sigma: float = 1.5, like: Tensor | None = None) -> Tensor:
    """Weights (size,) of the one-dimensional window, sum 1; the window is its outer product with itself."""
    like = torch.empty(0) if like is None else like
    offset = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    return torch.softmax(-(offset**2) / (2 * sigma**2), dim=0)


def blur_matrix(cells: int, window: Tensor) -> Tensor:
    """(cells, cells): row i holds the window around cell i, whose outside is reflected back in, the border not repeated.

    A window that reaches beyond a whole map is reflected again, as numpy pads; a single cell takes all its weight.
    """
    cell = torch.arange(cells, device=window.device)
    offset = torch.arange(len(window), device=window.device) - len(window) // 2
    period = max(1, 2 * (cells - 1))
    place = (cell[:, None] + offset) % period
    place = torch.minimum(place, period - place)  # (cells, size)
    return ((place[..., None] == cell) * window[:, None]).sum(1)


def blurred(maps: Tensor, window: Tensor) -> Tensor:
    """Windowed mean around each cell of (..., H, W), of the same size: one matrix product for each axis.

    A padded convolution would, by torch's defaults, run in TF32 on newer GPUs, too coarse for small variances, and its
    backward pass be refused under ``deterministic=true``.
    """
    height, width = masks.size(maps)
    return blur_matrix(height, window) @ (maps @ blur_matrix(width, window).T)


def similarity(
    student: Tensor, teacher: Tensor, window: Tensor, exponents: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """l^alpha c^beta s^gamma of each cell and channel; two (B, C, H, W) of range 1 -> (B, C, H, W) in [-1, 1].

    A negative factor keeps its sign under any exponent above 0: opposite structure is not to count as equal.
    """
    if exponents == (1, 1, 1):
        return _usual(student, teacher, window)
    # Apart, for the teacher's moments need no backward pass.
    mean_s, square_s, product = blurred(torch.stack([student, student**2, student * teacher]), window).unbind()
    mean_t, square_t = blurred(torch.stack([teacher, teacher**2]), window).unbind()
    # As kornia: rounding on large raw maps leaves the range.
    return likeness(mean_s, mean_t, square_s, square_t, product, exponents).clamp(-1, 1)


def likeness(
    mean_s: Tensor,
    mean_t: Tensor,
    square_s: Tensor,
    square_t: Tensor,
    product: Tensor,
    exponents: tuple[float, float, float],
) -> Tensor:
    """l^alpha c^beta s^gamma of each cell, from its windowed means of s, t, s^2, t^2 and s t, all of one shape."""
    # Population moments. A variance may fall below 0 by rounding, and at 0 the slope of its root is infinite.
    least = torch.finfo(product.dtype).eps ** 2
    variance_s, variance_t = (
        (square_s - mean_s.square()).clamp(min=least),
        (square_t - mean_t.square()).clamp(min=least),
    )
    covariance = product - mean_s * mean_t
    alpha, beta, gamma = exponents
    factors = []
    if alpha:
        factors.append(_power((2 * mean_s * mean_t + C1) / (mean_s.square() + mean_t.square() + C1), alpha))
    if beta == gamma == 1:  # contrast times structure, for C3 is C2 / 2
        factors.append((2 * covariance + C2) / (variance_s + variance_t + C2))
    elif beta or gamma:
        deviations = variance_s.sqrt() * variance_t.sqrt()
        if beta:
            factors.append(_power((2 * deviations + C2) / (variance_s + variance_t + C2), beta))
        if gamma:
            factors.append(_power((covariance + C3) / (deviations + C3), gamma))
    return math.prod(factors[1:], start=factors[0])


def _usual(student: Tensor, teacher: Tensor, window: Tensor) -> Tensor:
    """All exponents 1: one fraction, which needs no more than the sum of both variances."""
    mean_s, squares, product = blurred(
        torch.stack([student, student.square() + teacher.square(), student * teacher]), window
    ).unbind()
    mean_t = blurred(teacher, window)
    crossed, own = mean_s * mean_t, mean_s.square() + mean_t.square()
    variances = (squares - own).clamp(min=0)
    # C3 is C2 / 2, so that contrast times structure is one factor.
    likeness = (2 * crossed + C1) * (2 * (product - crossed) + C2) / ((own + C1) * (variances + C2))
    return likeness.clamp(-1, 1)


def _power(x: Tensor, exponent: float) -> Tensor:
    """sign(x) |x|^exponent, with a finite slope at 0."""
    return x if exponent == 1 else x.sign() * x.abs().clamp(min=FLAT).pow(exponent)


@dataclass(frozen=True)
class Dissimilarity:
    """Called on the student's and the teacher's map (B, C, H, W): how far they differ, summed over channels (B, H, W).

    Args:
        error: ``ssim``: (1 - SSIM) / 2; ``l1``: absolute, ``l2``: squared difference.
        normalize: both maps are brought to [0, 1] over each ``plane``, ``image``, the ``tensor``, or left (``none``).
        size, sigma: of the window, in cells.
        luminance, contrast, structure: exponents; 0 leaves a factor out.
        blocks: whether `sums` may work in blocks of planes: equal but for rounding, in less time.
    """

    error: str = "ssim"
    normalize: str = "plane"
    size: int = 11
    sigma: float = 1.5
    luminance: float = 1.0
    contrast: float = 1.0
    structure: float = 1.0
    blocks: bool = True

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise DistillError(f"error: expected one of {', '.join(ERRORS)}, got '{self.error}'")
        if self.normalize not in SCOPES:
            raise DistillError(f"normalize: expected one of {', '.join(SCOPES)}, got '{self.normalize}'")
        if not (isinstance(self.size, int) and self.size > 0 and self.size % 2):
            raise DistillError(f"window.size: expected an odd number of cells, got {self.size}")
        if not 0 < self.sigma < math.inf:
            raise DistillError(f"window.sigma: expected cells, above 0, got {self.sigma}")
        if not (all(0 <= each < math.inf for each in self.exponents) and any(self.exponents)):
            raise DistillError(f"exponents: expected numbers, 0 or more, one above 0, got {self.exponents}")

    @property
    def squared(self) -> bool:
        """Whether it is a squared error."""
        return self.error == "l2"

    @property
    def exponents(self) -> tuple[float, float, float]:
        """Alpha, beta and gamma."""
        return self.luminance, self.contrast, self.structure

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, H, W), in float32 at least, under autocast too: half a precision hides flat maps."""
        with torch.autocast(student.device.type, enabled=False):
            ours = rescaled(upcast(student), self.normalize)
            theirs = rescaled(upcast(teacher.detach()), self.normalize)
            if self.error == "l1":
                return (ours - theirs).abs().sum(1)
            if self.error == "l2":
                return (ours - theirs).square().sum(1)
            window = gaussian(self.size, self.sigma, ours)
            return (1 - similarity(ours, theirs, window, self.exponents)).sum(1) / 2

    def sums(self, student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of each mask (B, H, W), the sum of mask times what a call gives; in blocks, where they are worth it."""
        if not self.blocks or self.normalize not in ("plane", "none"):
            error = self(student, teacher)
            return [(mask * error).sum() for mask in masks]
        with torch.autocast(student.device.type, enabled=False):
            ours, theirs = upcast(student), upcast(teacher.detach())
            block = self._ssim_block(ours) if self.error == "ssim" else by_autograd(self)
            return in_blocks(block, ours, theirs, masks).unbind()

    def _ssim_block(self, maps: Tensor) -> Block:
        window = gaussian(self.size, self.sigma, maps)
        height, width = (blur_matrix(cells, window) for cells in (maps.shape[-2], maps.shape[-1]))
        flat = FLAT if self.normalize == "plane" else None
        general = None if self.exponents == (1, 1, 1) else partial(likeness, exponents=self.exponents)
        return ssim_block(Frame((height, width), self.size // 2, (C1, C2), flat, general), maps)


class SSIM(DistillLoss):
    """Compare the neck's maps by their local luminance, contrast and structure instead of by each cell alone.

    ::

        neck.foreground = sum_l  1/N_l sum e(psi(A_l(S_l)), psi(T_l))      sum over n, c, h, w; N_l = B C H_l W_l
        e   = (1 - l^alpha c^beta s^gamma) / 2, each channel and cell apart
        l   = (2 mu_S mu_T + C1) / (mu_S^2 + mu_T^2 + C1)
        c   = (2 sd_S sd_T + C2) / (sd_S^2 + sd_T^2 + C2)
        s   = (cov_ST + C3) / (sd_S sd_T + C3)              C1 = 0.01^2, C2 = 0.03^2, C3 = C2 / 2
        psi = (x - min) / (max - min + 1e-6), of each plane

    with population moments in a Gaussian window of 11 x 11 cells, sigma 1.5; A_l is a 1 x 1 convolution.

    Source: de Rijk, Schneider, Cordts, Gavrila, "Structural Knowledge Distillation for Object Detection", NeurIPS 2022,
    arXiv 2211.13133, known to us second-hand (its abstract and readings of it); there is no public code. The local loss
    equals ``kornia.losses.ssim_loss``, with its reflect padding, on which the paper is said to rest.

    Where we differ, or had to choose: the scope of psi is not stated, ours is kornia's, a plane; what is flat there passes
    no gradient. A map with a side below 6 cells, which kornia refuses, is reflected again and again; of a single cell a
    plane has nothing to compare, and gives 0. With a mask, the mean of each level is over the part's cells, and windows
    look across its border. Counts run over all processes.

    Shapes: maps (B, C, H, W). The paper's weight is an open point: one source tells of one lambda for both of its
    detectors, best at 2 or 4; 4 is our default. None is told for a mask.

    Args:
        student, teacher: specs of both detectors.
        neck: weights of its terms; ``levels``: strides, None for all that both have.
        error: ``ssim``, or the paper's rivals in the same frame: ``l1``, ``l2``.
        window: its ``size``, odd, and ``sigma``, in cells.
        exponents: of ``luminance`` (alpha), ``contrast`` (beta) and ``structure`` (gamma); 0 leaves a factor out.
        normalize: what one minimum and maximum serve: ``plane``, ``image``, ``tensor`` (of this process), ``none``.
        mask: options of :class:`distill.losses.masks.Mask`. With kind ``none``, the paper's, the whole map is foreground, and
            there is no background term.
        adapter: see `distill.losses.adapters`. Without one, which needs equal channels, the paper lost 1.1 AP between
            different architectures and nothing between depths of one.
        ramp, normalizer, seed: see :class:`DistillLoss`. The draws are those of ``random`` masks.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        error: str = "ssim",
        window: Mapping[str, Any] = WINDOW,
        exponents: Mapping[str, float] = EXPONENTS,
        normalize: str = "plane",
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        own = base.options("neck", neck, NECK)
        self.mask = masks.Mask(**base.options("mask", mask, MASK))
        regions = ("foreground",) if self.mask.kind == "none" else ("foreground", "background")
        if self.mask.kind == "none" and own["background"]:
            raise DistillError(
                f"neck.background={own['background']}: without a mask the whole map is foreground. Set mask.kind, as in "
                "distill=ssim_masked, or neck.background=0"
            )
        super().__init__({f"neck.{region}": own[region] for region in regions}, ramp, normalizer, seed)
        local = base.options("window", window, WINDOW) | base.options("exponents", exponents, EXPONENTS)
        compare = Dissimilarity(error, normalize, **local)
        how = base.options("adapter", adapter, ADAPTER)
        self.maps: MapImitation | None = None
        if self.weights:
            self.maps = MapImitation(
                "neck",
                student.neck,
                teacher.neck,
                own["levels"],
                how,
                error=compare,
                count="mse",
                over_levels="sum",
                seed=seed,
            )

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if self.maps is None:
            return {}
        mask = self.mask(student, self.maps.sizes(student.neck), self.seeds(student.batch.ids))
        return self.average(self.maps(student.neck, teacher.neck, parts(mask, self.terms("neck"))))
