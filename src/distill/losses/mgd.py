"""MGD: hide random cells of the student's maps, and restore the teacher's maps from the cells that remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import base
from distill.losses.adapters import adapter as convolution
from distill.losses.base import DistillLoss
from distill.losses.imitation import NeckPairs, squared_error
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

NECK = {"all": 5e-7, "levels": 4}
HIDDEN = {"ratio": 0.45, "what": "cells"}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}


def generator(channels: int, seed: int) -> nn.Sequential:
    """3x3 convolution, ReLU, 3x3 convolution, of the same width, with torch's default initial weights."""
    first, second = (convolution(channels, channels, 3, start="default", seed=seed + i) for i in range(2))
    return nn.Sequential(first, nn.ReLU(), second)


def kept(draws: Tensor, ratio: float) -> Tensor:
    """Mask from uniform draws in [0, 1): 1 for a kept cell, 0 for a hidden one, whose draw is above 1 - ratio."""
    return (draws <= 1 - ratio).float()


class MGD(DistillLoss):
    """Hide random cells of the student's map, and let a small network restore the teacher's map from the rest.

    ::

        neck.all = sum_l 1/B sum_{n, c, h, w} (G_l(A_l(S_l) * m_l) - T_l)^2
        m_l      = 0 with probability lambda, else 1: one value for each image and cell, for all channels
        G_l      = 3x3 convolution, ReLU, 3x3 convolution, trained with the student

    Source: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529, and its
    released code.

    Where we differ: masks are drawn from the epoch, the image's id and the stride, so they do not depend on the batch
    or the process; B is counted over all processes.

    Shapes: maps (B, C, H, W). Published: two-stage 5e-7 with lambda 0.45 on the four finest levels; one-stage 2e-5 with
    lambda 0.65 on all levels; gradients clipped at a norm of 35; neck and head inherited where the architectures are
    equal (``init=inherit``). MMRazor's variant can hide channels instead of cells.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, or a number of the finest shared levels, None for all.
        hidden: ``ratio``: lambda; ``what``: ``cells``, or ``channels``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`. The masks depend on the seed, too.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        hidden: Mapping[str, Any] = HIDDEN,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck, hidden = base.merge_options("neck", neck, NECK), base.merge_options("hidden", hidden, HIDDEN)
        super().__init__({"neck.all": neck["all"]}, ramp, normalizer, seed)
        if not base.is_number(hidden["ratio"], high=1) or hidden["what"] not in ("cells", "channels"):
            raise DistillError(
                "hidden: expected a ratio from 0 to below 1 and what of cells or channels, got "
                f"ratio={hidden['ratio']} and what={hidden['what']}"
            )
        self.ratio, self.of_cells = float(hidden["ratio"]), hidden["what"] == "cells"
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.neck: NeckPairs | None = None
        self.generators = nn.ModuleDict()
        if self.weights:
            self.neck = NeckPairs(student, teacher, neck["levels"], adapter, seed)
            own_seeds = {level: base.derive_seed(seed, "generator", level) for level in self.neck.levels}
            self.generators.update({str(at): generator(teacher.neck[at], own) for at, own in own_seeds.items()})

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The term of `weights`, a scalar."""
        if self.neck is None:
            return {}
        seeds, shares = self.seeds(student.batch.ids), []
        for level, (student_map, teacher_map) in zip(self.neck.levels, self.neck(student, teacher), strict=True):
            masked = student_map * self._mask(student_map, level, seeds)
            error = squared_error(upcast(self.generators[str(level)](masked)), teacher_map)
            shares.append(base.sum_and_size(error.sum(), len(error)))
        return self.average({"neck.all": base.summed(shares)})

    def _mask(self, x: Tensor, level: int, seeds: Sequence[int]) -> Tensor:
        """(B, 1, H, W) for cells, (B, C, 1, 1) for channels."""
        shape = (1, *x.shape[2:]) if self.of_cells else (x.shape[1], 1, 1)
        draws = []
        for seed in seeds:
            source = torch.Generator(x.device).manual_seed(base.derive_seed(seed, level))
            draws.append(torch.rand(shape, generator=source, device=x.device))
        return kept(torch.stack(draws), self.ratio).to(x.dtype)
