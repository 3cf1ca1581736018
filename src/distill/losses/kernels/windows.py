"""SSIM of a block of planes, with a hand-written gradient through the window and the rescaling.

`distill.losses.similarity.similarity` is the plain form; this one gives the same numbers in less than half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.kernels.blocks import Block, contiguous, planes_per_block

BUFFERS, SCRATCH = 12, 5
"""Number of buffers of a block, and how many of those after the first three are free once the similarity is known."""
BANDS = {"cpu": (20, 40)}
"""Rows and columns of one matrix product, because the window's matrix is 0 far from its diagonal. Elsewhere all."""

Similarity = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Similarity of each cell, from the windowed means of s, t, s^2, t^2 and s t."""


class Band(NamedTuple):
    """A part of a blurred axis: output cells, their input cells, and the part of the window's matrix between them."""

    outputs: slice
    inputs: slice
    weights: Tensor

    @classmethod
    def split(cls, matrix: Tensor, reach: int, size: int) -> list[Band]:
        """The bands of a whole axis, with `size` output cells each."""
        starts = range(0, len(matrix), size)
        slices = [(slice(start, start + size), slice(max(0, start - reach), start + size + reach)) for start in starts]
        return [cls(outputs, inputs, matrix[outputs, inputs]) for outputs, inputs in slices]


@dataclass(frozen=True)
class Window:
    """What all planes of a level share.

    Args:
        matrices: (H, H) and (W, W), the window along each axis, from `distill.losses.similarity.blur_matrix`.
        reach: of the window to either side, in cells.
        constants: C1 and C2.
        flat: each plane is rescaled to [0, 1] first, (x - min) / (max - min + flat), or to 0 where its range is below
            `flat`; None: no rescaling.
        similarity: for exponents other than 1; None: all exponents are 1, and the gradient of the similarity is
            hand-written too.
    """

    matrices: tuple[Tensor, Tensor]
    reach: int
    constants: tuple[float, float]
    flat: float | None
    similarity: Similarity | None = None

    @cached_property
    def bands(self) -> tuple[tuple[list[Band], list[Band]], ...]:
        """Bands of rows and columns, for the blur (index 0) and for its gradient (index 1)."""
        sizes = BANDS.get(self.matrices[0].device.type, tuple(map(len, self.matrices)))
        directions = (self.matrices, tuple(matrix.T for matrix in self.matrices))
        rows, columns = (
            [Band.split(matrices[axis], self.reach, sizes[axis]) for matrices in directions] for axis in (0, 1)
        )
        return tuple(zip(rows, columns, strict=True))

    def blur(self, x: Tensor, out: Tensor, between: Tensor, backward: bool = False) -> Tensor:
        """Windowed means of planes (H, P, W) into `out`, or with `backward` the gradient of x from that of the means.

        `between` is a buffer of the same size.
        """
        (rows, columns), (height, _, width) = self.bands[backward], x.shape
        lines, lines_between = x.view(height, -1), between.view(height, -1)
        for band in rows:
            torch.mm(band.weights, lines[band.inputs], out=lines_between[band.outputs])
        cells, cells_out = between.view(-1, width), out.view(-1, width)
        for band in columns:
            torch.mm(cells[:, band.inputs], band.weights.T, out=cells_out[:, band.outputs])
        return out


class Planes(NamedTuple):
    """Planes (P, H, W) and how to rescale them: three values (P, 1) per plane."""

    values: Tensor
    low: Tensor
    """The minimum."""
    factor: Tensor
    """The factor that rescales to [0, 1]."""
    top: Tensor
    """The rescaled maximum."""

    @classmethod
    def measure(cls, x: Tensor, flat: float | None) -> Planes:
        """Planes (P, H, W) with their factors, which are 0 where the range is below `flat`. With None no rescaling."""
        if flat is None:
            zeros = torch.zeros_like(x[:, :1, 0])
            return cls(x, zeros, zeros + 1, zeros)
        x = contiguous(x)  # the extremes of a channels-last map cost more than this copy
        low, high = x.amin((1, 2))[:, None], x.amax((1, 2))[:, None]
        span = high - low
        factor = (1 / (span + flat)).masked_fill(span < flat, 0.0)
        return cls(x, low, factor, span * factor)

    def rescale(self, out: Tensor) -> Tensor:
        """The rescaled planes, (P, H, W) into (H, P, W), whose products with the window need no copies."""
        return torch.sub(self.values.transpose(0, 1), self.low, out=out).mul_(self.factor)

    def rescale_backward(self, gradient: Tensor, rescaled: Tensor, buffer: Tensor) -> Tensor:
        """The gradient of the planes from that of the rescaled planes, in place; all tensors are (H, P, W).

        It also flows through the minimum and the maximum, in equal parts to all cells that have these values.
        """
        total = gradient.sum((0, 2))[:, None] * self.factor
        weighted = torch.mul(gradient, rescaled, out=buffer).sum((0, 2))[:, None] * self.factor
        gradient.mul_(self.factor)
        for value, flow in ((torch.zeros_like(self.top), weighted - total), (self.top, -weighted)):
            extreme = buffer.copy_(rescaled).eq_(value)
            gradient.addcmul_(extreme, flow / extreme.sum((0, 2))[:, None])
        return gradient


def ssim_block(window: Window, like: Tensor) -> Block:
    """A block function of (1 - SSIM) / 2 for maps like `like` (B, C, H, W) in size and dtype. Calls share buffers."""
    buffers = like.new_empty(BUFFERS, planes_per_block(like) * like.shape[2] * like.shape[3])

    def block(student: Tensor, teacher: Tensor, masks: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        pair = Planes.measure(student, window.flat), Planes.measure(teacher, window.flat)
        return _sum_planes(*pair, masks, gradients, window, buffers)

    return block


class SimilarityWithSlopes(NamedTuple):
    """Similarity of each cell before clamping, and its slopes by the windowed means of s, s^2 and s t.

    The slope by the mean of s^2 has the opposite sign. The other two are halved, because the loss is (1 - SSIM) / 2.
    """

    value: Tensor
    mean: Tensor
    square: Tensor
    product: Tensor


def _sum_planes(
    student: Planes,
    teacher: Planes,
    masks: Sequence[Tensor],
    gradients: Sequence[Tensor],
    window: Window,
    buffers: Tensor,
) -> Tensor:
    """The sums (masks,) over some planes of an image. Their gradients are written into `gradients`, if any."""
    planes, height, width = student.values.shape
    s, t, clamped, *free = (buffer[: planes * height * width].view(height, planes, width) for buffer in buffers)
    student.rescale(s)
    teacher.rescale(t)
    compare = _similarity_by_hand if window.similarity is None else _similarity_by_autograd
    similarity = compare(s, t, window, free, bool(gradients))
    torch.clamp(similarity.value, -1, 1, out=clamped)
    error = (planes - clamped.sum(1)) / 2
    totals = torch.stack([(mask * error).sum() for mask in masks])
    if not gradients:
        return totals
    unclamped = clamped.eq_(similarity.value)  # no gradient where a value was clamped
    weights, total, part, product, between = free[:SCRATCH]
    for mask, gradient in zip(masks, gradients, strict=True):
        torch.mul(unclamped, mask[:, None], out=weights).neg_()
        window.blur(torch.mul(similarity.mean, weights, out=product), total, between, backward=True)
        window.blur(torch.mul(similarity.square, weights, out=product), part, between, backward=True)
        total.addcmul_(s, part, value=-1)
        window.blur(torch.mul(similarity.product, weights, out=product), part, between, backward=True)
        total.addcmul_(t, part)
        if window.flat is not None:
            student.rescale_backward(total, s, product)
        gradient.copy_(total.transpose(0, 1))
    return totals


def _similarity_by_hand(
    s: Tensor, t: Tensor, window: Window, free: Sequence[Tensor], grad: bool
) -> SimilarityWithSlopes:
    """For exponents of 1: the product of two fractions, b / a (luminance) and right / c (contrast times structure)."""
    value, mean_s, mean_t, a, between, right, b, c, variance = free
    window.blur(torch.mul(s, s, out=a).addcmul_(t, t), variance, between)
    window.blur(torch.mul(s, t, out=a), right, between)
    window.blur(s, mean_s, between)
    window.blur(t, mean_t, between)
    c1, c2 = window.constants
    torch.mul(mean_s, mean_s, out=a).addcmul_(mean_t, mean_t)
    torch.mul(mean_s, mean_t, out=b)
    variance.sub_(a)
    right.sub_(b).mul_(2).add_(c2)
    b.mul_(2).add_(c1).div_(a.add_(c1))
    right.div_(torch.clamp(variance, min=0, out=c).add_(c2))
    torch.mul(b, right, out=value)
    if grad:
        b.div_(c)
        torch.div(value, c, out=c).mul_(variance.gt_(0))
        torch.div(value, a, out=between)
        right.div_(a).sub_(b).mul_(mean_t).addcmul_(torch.sub(c, between, out=a), mean_s)
    return SimilarityWithSlopes(value, right, c, b)


def _similarity_by_autograd(
    s: Tensor, t: Tensor, window: Window, free: Sequence[Tensor], grad: bool
) -> SimilarityWithSlopes:
    """For any exponents: autograd computes the slopes at the windowed means."""
    assert window.similarity is not None
    _, mean_s, mean_t, a, between, product, square_s, square_t, _ = free
    window.blur(s, mean_s, between)
    window.blur(t, mean_t, between)
    window.blur(torch.mul(s, s, out=a), square_s, between)
    window.blur(torch.mul(t, t, out=a), square_t, between)
    window.blur(torch.mul(s, t, out=a), product, between)
    with torch.set_grad_enabled(grad):
        # The leaf of s^2 is -1/2 of s^2: with an output gradient of 1/2 its slope has the form of
        # `SimilarityWithSlopes`.
        leaves = mean_leaf, square_leaf, product_leaf = [
            means.detach().requires_grad_(grad) for means in (mean_s, square_s.div_(-2), product)
        ]
        value = window.similarity(mean_leaf, mean_t, square_leaf * -2, square_t, product_leaf)
    if not grad:
        return SimilarityWithSlopes(value, value, value, value)
    half = torch.full_like(value, 0.5)
    slopes = torch.autograd.grad(value, leaves, half, allow_unused=True, materialize_grads=True)
    return SimilarityWithSlopes(value.detach(), *slopes)
