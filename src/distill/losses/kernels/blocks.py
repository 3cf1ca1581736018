"""Sums of an error of two maps under masks: a block of planes at a time, and the gradient at once.

A map of a fine level is larger than a processor's cache, and fresh memory costs more to be given by the system than to be
filled. A block stays near the core, and of a whole level nothing is kept for the backward pass but its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CELLS = {"cpu": 2**18}
"""Values of a block: few enough to stay near the core. On other devices as many as fill them."""
MANY = 2**24
LINE = 16
"""Values of a line of a cache: of a map with its channels last, as many planes are read at once."""

Block = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Called on some planes (P, H, W) of the student and the teacher, the image's masks (H, W), and for each mask the place
(P, H, W) into which the gradient of its sum is to be written, or no place at all; gives the sums (masks,)."""


def cells(x: Tensor) -> int:
    """How many values of a map are a block on its device."""
    return CELLS.get(x.device.type, MANY)


def planes_in_block(x: Tensor) -> int:
    """How many planes of a map (B, C, H, W) are a block, by whole lines where they are many."""
    planes = max(1, cells(x) // (x.shape[2] * x.shape[3]))
    return min(x.shape[1], planes // LINE * LINE or planes)


def contiguous(x: Tensor) -> Tensor:
    """Planes (P, H, W) of a map, each in one piece.

    Of a map with its channels last they are gathered first, then turned as one matrix, which is a copy that torch is fast in:
    half the time of a copy in one step.
    """
    planes, height, width = x.shape
    if x.is_contiguous() or x.stride(0) != 1:
        return x.contiguous()
    lines = x.permute(1, 2, 0).reshape(height * width, planes).contiguous()
    return lines.T.contiguous().view(planes, height, width)


def in_blocks(block: Block, student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The sums of a block over all of them, (masks,).

    Args:
        block: of one plane's numbers none may hang on another plane.
        student, teacher: maps (B, C, H, W) of one dtype; no gradient reaches the teacher.
        masks: (B, H, W) each.
    """
    return _InBlocks.apply(student, teacher, block, torch.is_grad_enabled(), *masks)  # type: ignore[no-any-return]


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, block: Block, grad: bool, *masks: Tensor) -> Tensor:
        gradients = [torch.empty_like(student) for _ in masks] if grad and ctx.needs_input_grad[0] else []
        totals, step = student.new_zeros(len(masks)), planes_in_block(student)
        for image in range(len(student)):
            for start in range(0, student.shape[1], step):
                part = image, slice(start, start + step)
                slopes = [each[part] for each in gradients]
                totals += block(student[part], teacher[part], [mask[image] for mask in masks], slopes)
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


def by_autograd(error: Callable[[Tensor, Tensor], Tensor]) -> Block:
    """A block of any error: maps (1, P, H, W) of both -> (1, H, W), summed over planes."""

    def block(ours: Tensor, theirs: Tensor, masks: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = contiguous(ours.detach()).requires_grad_(bool(slopes))
            unlike = error(leaf[None], contiguous(theirs)[None])[0]
            sums = [(mask * unlike).sum() for mask in masks]
        for index, slope in enumerate(slopes):
            slope.copy_(torch.autograd.grad(sums[index], leaf, retain_graph=index + 1 < len(slopes))[0])
        return torch.stack(sums).detach()

    return block
