"""Attention transfer: imitate the cells where the teacher's maps are large, in the mean over channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.losses import base
from distill.losses.attention import energy_map
from distill.losses.base import DistillLoss
from distill.losses.masks import map_size
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

NECK = {"all": 1000.0, "levels": None}


class AT(DistillLoss):
    """Imitate the spatial attention of the neck's maps. Channels are averaged, so there is no adapter.

    ::

        neck.all = sum_l 1 / (B H_l W_l) sum_{n, h, w} (Q(S_l) - Q(T_l))^2
        Q(F)     = q / |q|_2 of each image,  q = mean_c |F|^p,  p = 2

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928, equation 2 with
    the mean over batch and cells of the released code, whose weight is 1000. (The paper's equation has beta / 2 and the
    norm of the difference; its text sets beta to 1000 over the number of cells and the batch size.) The weight
    was published for classifiers; none is published for detectors.

    Shapes: maps (B, C, H, W), of any channels. B is counted over all processes.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, or a number of the finest shared levels, None for all.
        power: p.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        power: float = 2.0,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({"neck.all": neck["all"]}, ramp, normalizer, seed)
        if not (base.is_number(power) and power >= 1):
            raise DistillError(f"power: expected a number of at least 1, got {power}")
        self.power, self.levels = float(power), list[int]()
        if self.weights:
            self.levels = base.shared_levels("neck", student.neck, teacher.neck, neck["levels"])

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The term of `weights`, a scalar."""
        shares = []
        for level in self.levels:
            student_map, teacher_map = upcast(student.neck[level]), upcast(teacher.neck[level].detach())
            if map_size(student_map) != map_size(teacher_map):  # channels may differ
                remedy = "Leave this stride out with neck.levels"
                base.require_equal_shapes(f"neck, stride {level}", student_map, teacher_map, remedy)
            with torch.autocast(student_map.device.type, enabled=False):
                error = (energy_map(student_map, self.power) - energy_map(teacher_map, self.power)).square()
            shares.append(base.sum_and_size(error.sum(), error.numel()))
        return self.average({"neck.all": base.summed(shares)} if shares else {})
