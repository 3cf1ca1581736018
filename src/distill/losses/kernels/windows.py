"""SSIM of a block of planes, with its gradient through the window and the rescaling written by hand.

The equation in its plain form is `distill.losses.ssim.similarity`; this gives the same numbers in less than half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.kernels.blocks import Block, contiguous, planes_in_block

BUFFERS, SCRATCH = 12, 5
"""Maps that a block works with; of those after the first three, how many are free once the likeness is known."""
BANDS = {"cpu": (20, 40)}
"""Rows and columns that one matrix product gives, for the window's matrix is 0 far from its diagonal. Elsewhere all."""

Likeness = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of each cell, from windowed means of s, t, s^2, t^2 and s t."""


class Band(NamedTuple):
    """Some cells of a blurred axis, the cells that they are made from, and the part of the window's matrix between them."""

    to: slice
    near: slice
    weights: Tensor

    @classmethod
    def all(cls, matrix: Tensor, reach: int, most: int) -> list[Band]:
        """Of a whole axis, `most` cells each."""
        starts = range(0, len(matrix), most)
        places = [(slice(start, start + most), slice(max(0, start - reach), start + most + reach)) for start in starts]
        return [cls(to, near, matrix[to, near]) for to, near in places]


@dataclass(frozen=True)
class Frame:
    """What is the same for all planes of a level.

    Args:
        matrices: (H, H) and (W, W), the window along each axis, as `distill.losses.ssim.blur_matrix` gives them.
        reach: of the window to either side, in cells.
        constants: C1 and C2.
        flat: each plane is brought to [0, 1] first, (x - min) / (max - min + flat), or to 0 where it is flatter; None:
            left as it is.
        likeness: of exponents other than 1; None: all are 1, and its slopes are written by hand too.
    """

    matrices: tuple[Tensor, Tensor]
    reach: int
    constants: tuple[float, float]
    flat: float | None
    likeness: Likeness | None = None

    @cached_property
    def bands(self) -> tuple[tuple[list[Band], list[Band]], ...]:
        """Of rows and columns, for a map and for the gradient that flows back to it."""
        sizes = BANDS.get(self.matrices[0].device.type, tuple(map(len, self.matrices)))
        ways = (self.matrices, tuple(each.T for each in self.matrices))
        rows, columns = ([Band.all(way[axis], self.reach, sizes[axis]) for way in ways] for axis in (0, 1))
        return tuple(zip(rows, columns, strict=True))

    def blur(self, x: Tensor, out: Tensor, between: Tensor, back: bool = False) -> Tensor:
        """Windowed means of planes (H, P, W), or with `back` the gradient that flows to x from one of them."""
        (rows, columns), (height, _, width) = self.bands[back], x.shape
        lines, lines_between = x.view(height, -1), between.view(height, -1)
        for band in rows:
            torch.mm(band.weights, lines[band.near], out=lines_between[band.to])
        cells, cells_out = between.view(-1, width), out.view(-1, width)
        for band in columns:
            torch.mm(cells[:, band.near], band.weights.T, out=cells_out[:, band.to])
        return out


class Planes(NamedTuple):
    """Planes (P, H, W) with three values of each, (P, 1): its smallest, the factor that brings it to [0, 1], and
    what its largest becomes so."""

    values: Tensor
    low: Tensor
    factor: Tensor
    top: Tensor

    @classmethod
    def of(cls, x: Tensor, flat: float | None) -> Planes:
        """Of (P, H, W); what is flatter becomes 0. With None nothing is moved."""
        if flat is None:
            zeros = torch.zeros_like(x[:, :1, 0])
            return cls(x, zeros, zeros + 1, zeros)
        x = contiguous(x)  # of a map with its channels last, the extremes of some cost more than this copy
        low, high = x.amin((1, 2))[:, None], x.amax((1, 2))[:, None]
        span = high - low
        factor = (1 / (span + flat)).masked_fill(span < flat, 0.0)
        return cls(x, low, factor, span * factor)

    def rescaled(self, out: Tensor) -> Tensor:
        """(P, H, W) into (H, P, W), whose products with the window need no copies."""
        return torch.sub(self.values.transpose(0, 1), self.low, out=out).mul_(self.factor)

    def through(self, slope: Tensor, rescaled: Tensor, free: Tensor) -> Tensor:
        """The gradient before the rescaling of that behind it, in place, both (H, P, W).

        It flows through the smallest and the largest value too, in equal parts to all cells that have them.
        """
        total = slope.sum((0, 2))[:, None] * self.factor
        weighted = torch.mul(slope, rescaled, out=free).sum((0, 2))[:, None] * self.factor
        slope.mul_(self.factor)
        for value, flows in ((torch.zeros_like(self.top), weighted - total), (self.top, -weighted)):
            here = free.copy_(rescaled).eq_(value)
            slope.addcmul_(here, flows / here.sum((0, 2))[:, None])
        return slope


def ssim_block(frame: Frame, like: Tensor) -> Block:
    """A block of (1 - SSIM) / 2, whose steps share a few buffers; for maps of the size and dtype of `like` (B, C, H, W)."""
    buffers = like.new_empty(BUFFERS, planes_in_block(like) * like.shape[2] * like.shape[3])

    def block(ours: Tensor, theirs: Tensor, masks: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
        return _block(Planes.of(ours, frame.flat), Planes.of(theirs, frame.flat), masks, slopes, frame, buffers)

    return block


class Likenesses(NamedTuple):
    """Of each cell, before it is clamped, with slopes by the windowed means of s, s^2 and s t.

    That of s^2 is negative; the other two are halves, for the likeness counts by half.
    """

    value: Tensor
    mean: Tensor
    square: Tensor
    product: Tensor


def _block(
    ours: Planes,
    theirs: Planes,
    masks: Sequence[Tensor],
    slopes: Sequence[Tensor],
    frame: Frame,
    buffers: Tensor,
) -> Tensor:
    """The sums of some planes of an image; their gradients are written into `slopes`, where there are some."""
    planes, height, width = ours.values.shape
    s, t, on, *room = (each[: planes * height * width].view(height, planes, width) for each in buffers)
    ours.rescaled(s)
    theirs.rescaled(t)
    like = (_by_hand if frame.likeness is None else _by_autograd)(s, t, frame, room, bool(slopes))
    torch.clamp(like.value, -1, 1, out=on)
    unlike = (planes - on.sum(1)) / 2
    totals = torch.stack([(mask * unlike).sum() for mask in masks])
    if not slopes:
        return totals
    on.eq_(like.value)  # no slope where the clamp held a value
    falls, slope, back, a, between = room[:SCRATCH]
    for mask, wanted in zip(masks, slopes, strict=True):
        torch.mul(on, mask[:, None], out=falls).neg_()
        frame.blur(torch.mul(like.mean, falls, out=a), slope, between, back=True)
        slope.addcmul_(s, frame.blur(torch.mul(like.square, falls, out=a), back, between, back=True), value=-1)
        slope.addcmul_(t, frame.blur(torch.mul(like.product, falls, out=a), back, between, back=True))
        wanted.copy_((slope if frame.flat is None else ours.through(slope, s, a)).transpose(0, 1))
    return totals


def _by_hand(s: Tensor, t: Tensor, frame: Frame, room: Sequence[Tensor], grad: bool) -> Likenesses:
    """With all exponents 1: two fractions, left = b / a and right / c: luminance, and contrast times structure."""
    like, mean_s, mean_t, a, between, right, b, c, variance = room
    frame.blur(torch.mul(s, s, out=a).addcmul_(t, t), variance, between)
    frame.blur(torch.mul(s, t, out=a), right, between)
    frame.blur(s, mean_s, between)
    frame.blur(t, mean_t, between)
    c1, c2 = frame.constants
    torch.mul(mean_s, mean_s, out=a).addcmul_(mean_t, mean_t)
    torch.mul(mean_s, mean_t, out=b)
    variance.sub_(a)
    right.sub_(b).mul_(2).add_(c2)
    b.mul_(2).add_(c1).div_(a.add_(c1))
    right.div_(torch.clamp(variance, min=0, out=c).add_(c2))
    torch.mul(b, right, out=like)
    if grad:
        b.div_(c)
        torch.div(like, c, out=c).mul_(variance.gt_(0))
        torch.div(like, a, out=between)
        right.div_(a).sub_(b).mul_(mean_t).addcmul_(torch.sub(c, between, out=a), mean_s)
    return Likenesses(like, right, c, b)


def _by_autograd(s: Tensor, t: Tensor, frame: Frame, room: Sequence[Tensor], grad: bool) -> Likenesses:
    """With any exponents, whose slopes at the windowed means autograd finds."""
    assert frame.likeness is not None
    _, mean_s, mean_t, a, between, product, square_s, square_t, _ = room
    frame.blur(s, mean_s, between)
    frame.blur(t, mean_t, between)
    frame.blur(torch.mul(s, s, out=a), square_s, between)
    frame.blur(torch.mul(t, t, out=a), square_t, between)
    frame.blur(torch.mul(s, t, out=a), product, between)
    with torch.set_grad_enabled(grad):
        # The leaf of s^2 is -1/2 of it: so its slope comes as `Likenesses` has it when the likeness counts by half.
        leaves = mean, square, both = [
            each.detach().requires_grad_(grad) for each in (mean_s, square_s.div_(-2), product)
        ]
        value = frame.likeness(mean, mean_t, square * -2, square_t, both)
    if not grad:
        return Likenesses(value, value, value, value)
    half = torch.full_like(value, 0.5)
    slopes = torch.autograd.grad(value, leaves, half, allow_unused=True, materialize_grads=True)
    return Likenesses(value.detach(), *slopes)
