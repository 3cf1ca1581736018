"""Sums of an error of two maps under masks, computed with their gradient, one block of planes at a time.

A map of a fine level is larger than a processor's cache, and allocating new memory costs more than filling it. A block
fits in the cache, and the backward pass of a whole level stores only its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VALUES = {"cpu": 2**18}
"""Values of a block that fits in the cache, by device type."""
DEFAULT_VALUES = 2**24
"""Values of a block that keeps any other device busy."""
CACHE_LINE = 16
"""Values in a cache line. A channels-last map is read in units of so many planes."""

Block = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A function of some planes (P, H, W) of student and teacher, the masks (H, W) of their image, and one output (P, H, W)
per mask for the gradient of its sum, or no outputs at all. It returns the sums (masks,)."""


def values_per_block(x: Tensor) -> int:
    """Number of values of a map in one block on its device."""
    return VALUES.get(x.device.type, DEFAULT_VALUES)


def planes_per_block(x: Tensor) -> int:
    """Number of planes of a map (B, C, H, W) in one block, a multiple of the cache line where there are many."""
    planes = max(1, values_per_block(x) // (x.shape[2] * x.shape[3]))
    return min(x.shape[1], planes // CACHE_LINE * CACHE_LINE or planes)


def contiguous(x: Tensor) -> Tensor:
    """Planes (P, H, W) of a map, each contiguous in memory.

    The planes of a channels-last map are gathered first and then transposed as one matrix, a copy that torch does fast:
    half the time of a copy in one step.
    """
    planes, height, width = x.shape
    if x.is_contiguous() or x.stride(0) != 1:
        return x.contiguous()
    lines = x.permute(1, 2, 0).reshape(height * width, planes).contiguous()
    return lines.T.contiguous().view(planes, height, width)


def sum_in_blocks(block: Block, student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The sums (masks,) of a block function over all planes.

    Args:
        block: its result for one plane must not depend on any other plane.
        student, teacher: maps (B, C, H, W) of one dtype. No gradient reaches the teacher.
        masks: (B, H, W) each.
    """
    return _SumInBlocks.apply(student, teacher, block, torch.is_grad_enabled(), *masks)  # type: ignore[no-any-return]


class _SumInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, block: Block, grad: bool, *masks: Tensor) -> Tensor:
        gradients = [torch.empty_like(student) for _ in masks] if grad and ctx.needs_input_grad[0] else []
        totals, step = student.new_zeros(len(masks)), planes_per_block(student)
        for image in range(len(student)):
            for start in range(0, student.shape[1], step):
                part = image, slice(start, start + step)
                outputs = [gradient[part] for gradient in gradients]
                totals += block(student[part], teacher[part], [mask[image] for mask in masks], outputs)
        ctx.save_for_backward(*gradients)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = ctx.saved_tensors
        total = first * factors[0]
        for factor, gradient in zip(factors[1:], others, strict=True):
            total.addcmul_(gradient, factor)
        return total, *(None for _ in range(3 + len(factors)))


def autograd_block(error: Callable[[Tensor, Tensor], Tensor]) -> Block:
    """A block function of any error: maps (1, P, H, W) of both -> (1, H, W), summed over planes."""

    def block(student: Tensor, teacher: Tensor, masks: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = contiguous(student.detach()).requires_grad_(bool(gradients))
            values = error(leaf[None], contiguous(teacher)[None])[0]
            sums = [(mask * values).sum() for mask in masks]
        for index, gradient in enumerate(gradients):
            gradient.copy_(torch.autograd.grad(sums[index], leaf, retain_graph=index + 1 < len(gradients))[0])
        return torch.stack(sums).detach()

    return block
