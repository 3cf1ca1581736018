"""DSIG's graph: errors of nodes and of the cosines between them, with a gradient that is one matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.precision import upcast

SHORTEST = 1e-3
"""Smallest divisor in a cosine, as a fraction of a typical length of the features."""


def graph_errors(student: Tensor, teacher: Tensor, member: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Errors of the nodes (B, R) and of the edges (B,) of two graphs with node features (B, R, F).

    Nodes: the mean squared error of each. Edges: half the mean squared error of the cosines between an image's member
    nodes (B, R), with the diagonal; 0 without members, and where `member` is None.
    """
    with torch.autocast(student.device.type, enabled=False):
        nodes, edges = _GraphErrors.apply(upcast(student), upcast(teacher.detach()), member)
    return nodes, edges


class _GraphErrors(torch.autograd.Function):
    """Stores and makes no tensor of the size of the features beyond the inputs, unlike autograd."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, member: Tensor | None) -> tuple[Tensor, Tensor]:
        squares = [torch.linalg.vector_norm(s - t, dim=-1).square() for s, t in _blocks(student, teacher)]
        nodes, edges = torch.cat(squares).view(student.shape[:2]) / student.shape[2], student.new_zeros(len(student))
        if member is None:
            ctx.save_for_backward(student, teacher)
            return nodes, edges
        scale, cosines, short = _cosines(student)
        difference = (cosines - _cosines(teacher)[1]).mul_(member[:, :, None] & member[:, None])
        count = 2 * member.sum(1).square().clamp(min=1).to(student.dtype)
        edges = difference.square().sum((1, 2)) / count
        # With N the unit vectors and D the difference, the gradient of the edges with respect to the features is
        # 4 / count (D - diag(row sums of D * cosines)) N, each row divided by the length of its feature.
        slopes = difference * (4 / count)[:, None, None]
        along = (slopes * cosines).sum(2).masked_fill_(short, 0.0)  # a short feature's divisor is a constant
        slopes = slopes.mul_(scale[:, :, None]).mul_(scale[:, None])
        slopes.diagonal(dim1=1, dim2=2).sub_(along * scale.square())
        ctx.save_for_backward(student, teacher, slopes)
        return nodes, edges

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nodes: Tensor, edges: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, *slopes = ctx.saved_tensors
        gradient = torch.sub(student, teacher).mul_((2 / student.shape[2] * nodes)[..., None])
        for slope in slopes:
            gradient.baddbmm_(slope * edges[:, None, None], student)
        return gradient, None, None


def _blocks(student: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some nodes of both at a time on a CPU, so that their difference stays in the cache; all at once elsewhere."""
    student_nodes, teacher_nodes = student.flatten(0, 1), teacher.flatten(0, 1)
    size = 16 if student.device.type == "cpu" else max(1, len(student_nodes))
    return zip(torch.split(student_nodes, size), torch.split(teacher_nodes, size), strict=True)


def _cosines(x: Tensor, blocks: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """1 / length (B, R) of nodes (B, R, F), their cosines (B, R, R), and which nodes are short (B, R).

    Each pair is computed once. A short node is divided by `SHORTEST` of the image's longest node instead of its own
    length: the gradient of the cosine of a region without signal would be any number.
    """
    lengths = torch.linalg.vector_norm(x, dim=2)
    shortest = (SHORTEST * lengths.amax(1, keepdim=True)).clamp(min=1e-12)
    scale, short = 1 / torch.maximum(lengths, shortest), lengths < shortest
    count = x.shape[1]
    cosines = x.new_empty(len(x), count, count)
    step = -(-count // blocks)
    for start in range(0, count, step):
        part = slice(start, start + step)
        cosines[:, part, start:] = x[:, part] @ x[:, start:].mT
        cosines[:, start + step :, part] = cosines[:, part, start + step :].mT
    return scale, cosines.mul_(scale[:, :, None]).mul_(scale[:, None]), short
