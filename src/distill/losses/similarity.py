"""Local dissimilarity of feature maps: SSIM and its alternatives l1 and l2, as functions and as an error of maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distill.losses.base import is_number
from distill.losses.kernels.blocks import Block, autograd_block, sum_in_blocks
from distill.losses.kernels.windows import Window, ssim_block
from distill.losses.masks import map_size
from distill.precision import upcast
from distill.types import DistillError

ERRORS = ("ssim", "l1", "l2")
SCOPES: dict[str, tuple[int, ...]] = {"plane": (2, 3), "image": (1, 2, 3), "tensor": (0, 1, 2, 3), "none": ()}
"""Axes of (B, C, H, W) over which the minimum and the maximum are taken."""
FLAT = 1e-6
C1, C2, C3 = 0.01**2, 0.03**2, 0.03**2 / 2
"""(K1 L)^2, (K2 L)^2 and C2 / 2, for maps with a dynamic range L of 1."""


def rescaled(x: Tensor, scope: str = "plane") -> Tensor:
    """(x - min) / (max - min + 1e-6) over a plane, an image or the whole tensor (B, C, H, W); ``none`` returns x.

    A range below 1e-6 becomes 0 without a gradient: the factor 1 / range would dominate all other gradients.
    """
    if not (axes := SCOPES[scope]):
        return x
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    span = high - low
    # One factor per plane: dividing and masking whole maps, forward and backward, costs more than the comparison.
    return (x - low) * (1 / (span + FLAT)).masked_fill(span < FLAT, 0.0)


def gaussian(size: int = 11, sigma: float = 1.5, like: Tensor | None = None) -> Tensor:
    """Weights (size,) of the one-dimensional window, with a sum of 1; the window is its outer product with itself."""
    like = torch.empty(0) if like is None else like
    offset = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    return torch.softmax(-(offset**2) / (2 * sigma**2), dim=0)


def blur_matrix(cells: int, window: Tensor) -> Tensor:
    """(cells, cells): row i holds the window around cell i. The part outside is reflected without repeating the border.

    A window that is larger than the map is reflected several times, as in numpy's padding. A single cell gets all
    weight.
    """
    cell = torch.arange(cells, device=window.device)
    offset = torch.arange(len(window), device=window.device) - len(window) // 2
    period = max(1, 2 * (cells - 1))
    place = (cell[:, None] + offset) % period
    place = torch.minimum(place, period - place)  # (cells, size)
    return ((place[..., None] == cell) * window[:, None]).sum(1)


def blurred(maps: Tensor, window: Tensor) -> Tensor:
    """Windowed mean around each cell of (..., H, W), of the same size: one matrix product per axis.

    A padded convolution would run in TF32 on newer GPUs (torch's default), which is too coarse for small variances, and
    ``deterministic=true`` would refuse its backward pass.
    """
    height, width = map_size(maps)
    return blur_matrix(height, window) @ (maps @ blur_matrix(width, window).T)


def similarity(
    student: Tensor, teacher: Tensor, window: Tensor, exponents: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """l^alpha c^beta s^gamma of each cell and channel; two (B, C, H, W) of range 1 -> (B, C, H, W) in [-1, 1].

    A negative factor keeps its sign under any exponent above 0, so that opposite structure does not count as equal.
    """
    if exponents == (1, 1, 1):
        return _similarity_of_unit_exponents(student, teacher, window)
    # The teacher's moments are computed separately, since they need no backward pass.
    mean_s, square_s, product = blurred(torch.stack([student, student**2, student * teacher]), window).unbind()
    mean_t, square_t = blurred(torch.stack([teacher, teacher**2]), window).unbind()
    # As in kornia: rounding on large raw maps leaves the range.
    return similarity_of_moments(mean_s, mean_t, square_s, square_t, product, exponents).clamp(-1, 1)


def similarity_of_moments(
    mean_s: Tensor,
    mean_t: Tensor,
    square_s: Tensor,
    square_t: Tensor,
    product: Tensor,
    exponents: tuple[float, float, float],
) -> Tensor:
    """l^alpha c^beta s^gamma of each cell, from its windowed means of s, t, s^2, t^2 and s t, all of one shape."""
    # Population moments. Rounding may bring a variance below 0, and at 0 its root has an infinite slope.
    least = torch.finfo(product.dtype).eps ** 2
    variance_s, variance_t = (
        (square_s - mean_s.square()).clamp(min=least),
        (square_t - mean_t.square()).clamp(min=least),
    )
    covariance = product - mean_s * mean_t
    alpha, beta, gamma = exponents
    factors = []
    if alpha:
        factors.append(_signed_power((2 * mean_s * mean_t + C1) / (mean_s.square() + mean_t.square() + C1), alpha))
    if beta == gamma == 1:  # contrast times structure is one fraction, because C3 is C2 / 2
        factors.append((2 * covariance + C2) / (variance_s + variance_t + C2))
    elif beta or gamma:
        deviations = variance_s.sqrt() * variance_t.sqrt()
        if beta:
            factors.append(_signed_power((2 * deviations + C2) / (variance_s + variance_t + C2), beta))
        if gamma:
            factors.append(_signed_power((covariance + C3) / (deviations + C3), gamma))
    return math.prod(factors[1:], start=factors[0])


def _similarity_of_unit_exponents(student: Tensor, teacher: Tensor, window: Tensor) -> Tensor:
    """One fraction, which needs only the sum of both variances, because contrast times structure is one factor."""
    mean_s, squares, product = blurred(
        torch.stack([student, student.square() + teacher.square(), student * teacher]), window
    ).unbind()
    mean_t = blurred(teacher, window)
    mean_product, mean_squares = mean_s * mean_t, mean_s.square() + mean_t.square()
    variances = (squares - mean_squares).clamp(min=0)
    value = (2 * mean_product + C1) * (2 * (product - mean_product) + C2) / ((mean_squares + C1) * (variances + C2))
    return value.clamp(-1, 1)


def _signed_power(x: Tensor, exponent: float) -> Tensor:
    """sign(x) |x|^exponent, with a finite slope at 0."""
    return x if exponent == 1 else x.sign() * x.abs().clamp(min=FLAT).pow(exponent)


@dataclass(frozen=True)
class Dissimilarity:
    """Dissimilarity of the student's and the teacher's map (B, C, H, W), summed over channels (B, H, W).

    Args:
        error: ``ssim``: (1 - SSIM) / 2; ``l1``: absolute, ``l2``: squared difference.
        normalize: rescale both maps to [0, 1] over each ``plane``, ``image`` or the ``tensor``, or not at all
            (``none``).
        size, sigma: of the window, in cells.
        luminance, contrast, structure: exponents; 0 leaves a factor out.
        blocks: whether `sums` may work in blocks of planes: the same up to rounding, in less time.
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
        if not (all(map(is_number, self.exponents)) and any(self.exponents)):
            raise DistillError(f"exponents: expected numbers, 0 or more, one above 0, got {self.exponents}")

    @property
    def squared(self) -> bool:
        """Whether the error is a squared one."""
        return self.error == "l2"

    @property
    def exponents(self) -> tuple[float, float, float]:
        """Alpha, beta and gamma."""
        return self.luminance, self.contrast, self.structure

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, H, W), in float32 at least, also under autocast: half precision hides flat maps."""
        with torch.autocast(student.device.type, enabled=False):
            student_map = rescaled(upcast(student), self.normalize)
            teacher_map = rescaled(upcast(teacher.detach()), self.normalize)
            if self.error == "l1":
                return (student_map - teacher_map).abs().sum(1)
            if self.error == "l2":
                return (student_map - teacher_map).square().sum(1)
            window = gaussian(self.size, self.sigma, student_map)
            return (1 - similarity(student_map, teacher_map, window, self.exponents)).sum(1) / 2

    def sums(self, student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Sequence[Tensor]:
        """For each mask (B, H, W), the sum of mask times the result of a call; in blocks where possible."""
        if not self.blocks or self.normalize not in ("plane", "none"):
            error = self(student, teacher)
            return [(mask * error).sum() for mask in masks]
        with torch.autocast(student.device.type, enabled=False):
            student_map, teacher_map = upcast(student), upcast(teacher.detach())
            block = self._ssim_block(student_map) if self.error == "ssim" else autograd_block(self)
            return sum_in_blocks(block, student_map, teacher_map, masks).unbind()

    def _ssim_block(self, maps: Tensor) -> Block:
        window = gaussian(self.size, self.sigma, maps)
        height, width = (blur_matrix(cells, window) for cells in map_size(maps))
        flat = FLAT if self.normalize == "plane" else None
        general = None if self.exponents == (1, 1, 1) else partial(similarity_of_moments, exponents=self.exponents)
        return ssim_block(Window((height, width), self.size // 2, (C1, C2), flat, general), maps)
