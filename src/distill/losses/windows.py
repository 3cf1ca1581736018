"""SSIM with all exponents 1, summed under masks: a block of planes at a time, and its gradient at once.

The equation in its plain form is `distill.losses.ssim.similarity`; this gives the same numbers for less. A map of a fine
level is larger than a processor's cache, and fresh memory costs more to be given by the system than to be filled. So all
steps of a block share a few buffers, and of a level nothing is kept for the backward pass but its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BUFFERS = 12
CELLS = {"cpu": 2**18}
"""Values of a block in one buffer: few enough to stay near the core. On other devices as many as fill them."""
MANY = 2**24
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
    """Maps (..., H, W) with three values of each plane, (..., 1): its smallest, the factor that brings it to [0, 1], and
    what its largest becomes so."""

    values: Tensor
    low: Tensor
    factor: Tensor
    top: Tensor

    @classmethod
    def of(cls, x: Tensor, flat: float | None) -> Planes:
        """Of (B, C, H, W); what is flatter becomes 0. With None nothing is moved."""
        if flat is None:
            zeros = torch.zeros_like(x[:, :, :1, 0])
            return cls(x, zeros, zeros + 1, zeros)
        low, high = x.amin((2, 3))[..., None], x.amax((2, 3))[..., None]
        span = high - low
        factor = (1 / (span + flat)).masked_fill(span < flat, 0.0)
        return cls(x, low, factor, span * factor)

    def at(self, part: tuple[int, slice]) -> Planes:
        """Some planes of an image: (P, H, W)."""
        return Planes(*(each[part] for each in self))

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


def masked_ssim(student: Tensor, teacher: Tensor, masks: Sequence[Tensor], frame: Frame) -> Tensor:
    """Sums of M (1 - SSIM) / 2 over images, channels and cells, (masks,).

    Args:
        student, teacher: maps (B, C, H, W) of one dtype; no gradient reaches the teacher.
        masks: (B, H, W) each.
        frame: window and constants.
    """
    return _MaskedSSIM.apply(student, teacher, frame, torch.is_grad_enabled(), *masks)  # type: ignore[no-any-return]


class _MaskedSSIM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, frame: Frame, grad: bool, *masks: Tensor) -> Tensor:
        gradients = [torch.empty_like(student) for _ in masks] if grad and ctx.needs_input_grad[0] else []
        channels, height, width = student.shape[1:]
        planes = min(channels, max(1, CELLS.get(student.device.type, MANY) // (height * width)))
        buffers = student.new_empty(BUFFERS, height * planes * width)
        totals = student.new_zeros(len(masks))
        ours, theirs = (Planes.of(each, frame.flat) for each in (student, teacher))
        for image in range(len(student)):
            for start in range(0, channels, planes):
                part = image, slice(start, start + planes)
                slopes = [each[part] for each in gradients]
                _block(ours.at(part), theirs.at(part), [mask[image] for mask in masks], slopes, totals, frame, buffers)
        ctx.save_for_backward(*gradients)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = ctx.saved_tensors
        gradient = first * factors[0]
        for factor, each in zip(factors[1:], others, strict=True):
            gradient.addcmul_(each, factor)
        return gradient, *(None for _ in range(3 + len(factors)))


def _block(
    ours: Planes,
    theirs: Planes,
    masks: Sequence[Tensor],
    slopes: Sequence[Tensor],
    totals: Tensor,
    frame: Frame,
    buffers: Tensor,
) -> None:
    """Add the sums of some planes of an image to `totals`, and write their gradients into `slopes`, where there are some."""
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
    for index, mask in enumerate(masks):
        totals[index] += (mask * unlike).sum()
    if not slopes:
        return
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
