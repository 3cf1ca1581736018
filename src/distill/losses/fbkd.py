"""FBKD: imitate maps by attention, their means over cells and over channels, and the relations between cells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import distributed
from distill.losses import base
from distill.losses.adapters import adapter as convolution
from distill.losses.attention import spatial_attention
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import NeckPairs
from distill.losses.standardization import BatchNorm
from distill.precision import upcast
from distill.types import DetectorSpec, View

NECK = {"attended": 7e-5, "channels": 4e-3, "cells": 4e-3, "relation": 7e-5, "levels": 4}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}
BLOCKS = ((8, 4), (4, 4))
"""Side of the max-pooling, and channels of the map per inner channel, in the non-local blocks of the finest levels."""
OTHER_BLOCKS = (2, 2)
"""The same for all other levels."""


class NonLocal(nn.Module):
    """Relate every cell to all cells: F + BN(W_o (theta(F) (phi(F)^T g(F)) / cells)), without a softmax.

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, with dot products, as in MMRazor. theta, phi, g and W_o
    are 1x1 convolutions. BN is a batch norm over the current batch, whose weight starts at 0, so the untrained block is
    the identity.

    Args:
        channels: of the maps (B, C, H, W).
        pool: side of the max-pooling of phi and g, clipped to the map.
        reduction: theta, phi and g have C / reduction channels, at least 1.
        seed: of the start values.
        everywhere: whether the batch norm takes its statistics over the batches of all processes.
    """

    def __init__(
        self, channels: int, pool: int = 1, reduction: int = 2, seed: int = 0, everywhere: bool = False
    ) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.theta, self.phi, self.g = (
            convolution(channels, hidden, 1, start="default", seed=seed + part) for part in range(3)
        )
        self.out = convolution(hidden, channels, 1, start="default", seed=seed + 3)
        self.out.register_parameter("bias", None)  # the norm would cancel it
        self.norm = BatchNorm(channels, everywhere)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        side = min(self.pool, *x.shape[2:])
        phi, g = (F.max_pool2d(layer(x), side).flatten(2) for layer in (self.phi, self.g))
        # Divided before the product: a sum over thousands of cells may exceed the range of float16.
        phi, g = (part / math.sqrt(part.shape[2]) for part in (phi, g))
        # The products are associative: (phi^T g) has the inner channels squared, theta phi^T has the cells squared.
        mixing = phi @ g.transpose(1, 2)  # (B, hidden of phi, hidden of g)
        related = torch.einsum("bihw,bij->bjhw", self.theta(x), mixing)
        added: Tensor = self.norm(self.out(related))
        return x + added


class FBKD(DistillLoss):
    """Imitate maps by attention, the means over cells and over channels, and maps after non-local blocks.

    ::

        neck.attended = sum_l | sqrt(m_l) (A_l(S_l) - T_l) |_2         m = (A^S(S) + A^S(T)) / 2, without a gradient
        neck.channels = sum_l | linear_l(mean_hw S_l) - mean_hw T_l |_2
        neck.cells    = sum_l | conv3x3_l(mean_c S_l) - mean_c T_l |_2
        neck.relation = sum_l | conv1x1_l(NL_s(S_l)) - NL_t(T_l) |_2
        A^S           = H W softmax_hw(mean_c |F| / tau)

    The norms are roots of sums of squares over the whole batch. All layers are trained, also NL_t on the teacher's map.

    Source: Zhang, Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and
    Efficient Detectors", ICLR 2021; form and weights as in MMRazor. The channel attention of the paper is left out:
    MMRazor computes the attention, but does not use it. The linear layer, the convolutions, NL_s and the attention take
    the student's map before its adapter, as in MMRazor.

    The batch is the batch of one process, as published, so the terms grow with the square root of the batch size per
    GPU. With ``normalizer="global"`` the norms, and the batch norms of the non-local blocks, are computed over the
    batches of all processes. The blocks pool by 8, 4, 2 and 2 and have a quarter, a quarter, a half and a half of the
    channels inside, finest level first. Their batch norms have no bias before them, which they would cancel.

    Shapes: maps (B, C, H, W). Published: 7e-5, 4e-3, 4e-3 and 7e-5 on the four finest levels of Faster R-CNN, tau =
    0.5.

    Args:
        student, teacher: specs of both detectors.
        neck: weights of its terms; ``levels``: strides, or a number of the finest shared levels, None for all.
        temperature: tau.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`, for ``attended``.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        temperature: float = 0.5,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "process",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({f"neck.{term}": neck[term] for term in NECK if term != "levels"}, ramp, normalizer, seed)
        self.temperature = base.check_temperature("temperature", temperature)
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.levels: list[int] = []
        self.neck: NeckPairs | None = None
        if self.weights:
            self.levels = base.shared_levels("neck", student.neck, teacher.neck, neck["levels"])
        if "neck.attended" in self.weights:
            self.neck = NeckPairs(student, teacher, self.levels, adapter, seed)
        blocks = zip(self.levels, (*BLOCKS, *[OTHER_BLOCKS] * len(self.levels)), strict=False)
        sides = [(level, (student.neck[level], teacher.neck[level]), block) for level, block in blocks]
        layers = {
            term: nn.ModuleDict(
                {
                    str(level): self._layers(term, channels, block, base.derive_seed(seed, term, level))
                    for level, channels, block in sides
                }
            )
            for term in self.terms("neck")
            if term != "attended"
        }
        self.layers: Any = nn.ModuleDict(layers)

    def _layers(self, term: str, channels: tuple[int, int], block: tuple[int, int], seed: int) -> nn.Module:
        """The trained layers of a term at one level, for maps of so many channels, student and teacher."""
        student, teacher = channels
        if term == "channels":
            # A linear layer over channels is a 1x1 convolution of a map of one cell.
            return convolution(student, teacher, 1, start="default", seed=seed)
        if term == "cells":
            return convolution(1, 1, 3, start="default", seed=seed)
        everywhere = self.normalizer == "global"
        return nn.ModuleDict(
            {
                "student": NonLocal(student, *block, seed, everywhere),
                "adapter": convolution(student, teacher, 1, start="default", seed=seed + 4),
                "teacher": NonLocal(teacher, *block, seed + 5, everywhere),
            }
        )

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        adapted = [None] * len(self.levels) if self.neck is None else self.neck(student, teacher)
        for level, pair in zip(self.levels, adapted, strict=True):
            student_map, teacher_map = student.neck[level], teacher.neck[level].detach()
            if student_map.shape[2:] != teacher_map.shape[2:]:
                remedy = "Leave this stride out with neck.levels"
                base.require_equal_shapes(f"neck, stride {level}", student_map, teacher_map, remedy)
            x, y = upcast(student_map), upcast(teacher_map)
            if pair is not None:
                own, target = (spatial_attention(maps, self.temperature) for maps in (x, y))
                weights = ((own + target) / 2).detach()[:, None]
                shares["neck.attended"].append(self._distance((pair[0] - pair[1]).square() * weights))
            for term, layers in self.layers.items():
                summary, goal = _summaries(term, layers[str(level)], x, y)
                shares[f"neck.{term}"].append(self._distance((upcast(summary) - upcast(goal)).square()))
        return self.average({term: base.summed(levels) for term, levels in shares.items()} if self.levels else {})

    def _distance(self, squares: Tensor) -> SumAndCount:
        """The root of a sum over the batch; at 0, where the root has an infinite slope, it passes no gradient."""
        total = squares.sum()
        total = distributed.sum_with_gradient(total) if self.normalizer == "global" else total
        return base.sum_and_size(total.clamp(min=torch.finfo(total.dtype).tiny).sqrt(), 1)


def _summaries(term: str, layers: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """What a term compares at one level."""
    if term == "channels":
        return layers(student.mean((2, 3), keepdim=True)), teacher.mean((2, 3), keepdim=True)
    if term == "cells":
        return layers(student.mean(1, keepdim=True)), teacher.mean(1, keepdim=True)
    return layers["adapter"](layers["student"](student)), layers["teacher"](teacher)
