"""SSIM with all exponents 1, of a block of planes, with its gradient written by hand.

The equation in its plain form is `distill.losses.ssim.similarity`; this gives the same numbers in less than half the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.blocks import Block, planes_in_block

BUFFERS = 12
BANDS = {"cpu": (20, 40)}
"""Rows and columns that one matrix product gives, for the window's matrix is 0 far from its diagonal. Elsewhere all."""


@dataclass(frozen=True)
class Frame:
    """What is the same for all planes of a level.

    Args:
        matrices: (H, H) and (W, W), the window along each axis, as `distill.losses.ssim.blur_matrix` gives them.
        reach: of the window to either side, in cells.
        constants: C1 and C2.
        flat: each plane is brought to [0, 1] first, (x - min) / (max - min + flat), or to 0 where it is flatter; None:
            left as it is.
    """

    matrices: tuple[Tensor, Tensor]
    reach: int
    constants: tuple[float, float]
    flat: float | None

    def blur(self, x: Tensor, out: Tensor, between: Tensor, back: bool = False) -> Tensor:
        """Windowed means of planes (H, P, W), or with `back` the gradient that flows to x from one of them."""
        (rows, columns), (height, _, width) = self.matrices, x.shape
        if back:
            rows, columns = rows.T, columns.T
        high, wide = BANDS.get(x.device.type, (height, width))
        flat_x, flat_between = x.view(height, -1), between.view(height, -1)
        for start in range(0, height, high):
            end, near = start + high, slice(max(0, start - self.reach), start + high + self.reach)
            torch.mm(rows[start:end, near], flat_x[near], out=flat_between[start:end])
        lines, flat_out = between.view(-1, width), out.view(-1, width)
        for start in range(0, width, wide):
            end, near = start + wide, slice(max(0, start - self.reach), start + wide + self.reach)
            torch.mm(lines[:, near], columns[start:end, near].T, out=flat_out[:, start:end])
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
        x = x.contiguous()  # of a map with its channels last, the extremes of some cost more than this copy
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
    room = (each[: planes * height * width].view(height, planes, width) for each in buffers)
    s, t, a, b, c, like, right, variance, mean_s, mean_t, on, between = room
    c1, c2 = frame.constants
    ours.rescaled(s)
    theirs.rescaled(t)

    # 1. Moments of the windows.
    frame.blur(torch.mul(s, s, out=a).addcmul_(t, t), variance, between)
    frame.blur(torch.mul(s, t, out=a), right, between)
    frame.blur(s, mean_s, between)
    frame.blur(t, mean_t, between)
    # 2. Two fractions, left = b / a and right / c: luminance, and contrast times structure.
    torch.mul(mean_s, mean_s, out=a).addcmul_(mean_t, mean_t)
    torch.mul(mean_s, mean_t, out=b)
    variance.sub_(a)
    right.sub_(b).mul_(2).add_(c2)
    b.mul_(2).add_(c1).div_(a.add_(c1))
    right.div_(torch.clamp(variance, min=0, out=c).add_(c2))
    torch.mul(b, right, out=like)
    torch.clamp(like, -1, 1, out=on)
    unlike = (planes - on.sum(1)) / 2
    totals = torch.stack([(mask * unlike).sum() for mask in masks])
    if not slopes:
        return totals
    # 3. Half the slopes of the likeness to the mean of s (in right) and to the blurred product (in b), and, negative, the
    #    whole one to the blurred squares (in c); without a slope where a clamp held a value.
    b.div_(c)
    torch.div(like, c, out=c).mul_(variance.gt_(0))
    torch.div(like, a, out=between)
    right.div_(a).sub_(b).mul_(mean_t).addcmul_(torch.sub(c, between, out=a), mean_s)
    on.eq_(like)
    # 4. Back through the window, whose buffers of means are free now.
    slope, back, falls = mean_s, mean_t, like
    for mask, wanted in zip(masks, slopes, strict=True):
        torch.mul(on, mask[:, None], out=falls).neg_()
        frame.blur(torch.mul(right, falls, out=a), slope, between, back=True)
        slope.addcmul_(s, frame.blur(torch.mul(c, falls, out=a), back, between, back=True), value=-1)
        slope.addcmul_(t, frame.blur(torch.mul(b, falls, out=a), back, between, back=True))
        wanted.copy_((slope if frame.flat is None else ours.through(slope, s, a)).transpose(0, 1))
    return totals
