"""PKD: imitate the teacher's maps by Pearson correlation, which ignores the mean and the scale of each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import adapters, base
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.masks import map_size
from distill.losses.standardization import channel_moments, standardized
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

NECK = {"all": 6.0, "levels": 4, "match": "stride", "resize": "student"}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}
MATCHES = ("stride", "position")
RESIZED = ("student", "teacher")


def equally_large(student: Tensor, teacher: Tensor, resize: str = "student") -> tuple[Tensor, Tensor]:
    """Return both maps (B, C, H, W), one of them resized bilinearly (corners unaligned) to the size of the other."""
    if map_size(student) == map_size(teacher):
        return student, teacher
    if resize == "student":
        return F.interpolate(student, map_size(teacher), mode="bilinear"), teacher
    return student, F.interpolate(teacher, map_size(student), mode="bilinear")


def correlation_errors(
    pairs: Sequence[tuple[Tensor, Tensor]], resize: str = "student", everywhere: bool = False
) -> list[SumAndCount]:
    """1/2 sum (z(S) - z(T))^2 and the number of elements of each pair of maps (B, C, H, W).

    Args:
        pairs: the student's and the teacher's map of each level.
        resize: which map is resized where the sizes of a pair differ, ``student`` or ``teacher``.
        everywhere: whether statistics are computed over the batches of all processes.
    """
    maps = [equally_large(upcast(student), upcast(teacher.detach()), resize) for student, teacher in pairs]
    students, teachers = [student for student, _ in maps], [teacher for _, teacher in maps]
    student_moments, teacher_moments = channel_moments(students, everywhere), channel_moments(teachers, everywhere)
    shares = []
    for x, y, moments, target_moments in zip(students, teachers, student_moments, teacher_moments, strict=True):
        error = (standardized(x, moments) - standardized(y, target_moments)).square().sum() / 2
        shares.append(base.sum_and_size(error, x.numel()))
    return shares


class PKD(DistillLoss):
    """Imitate the neck's maps after standardization of each channel, so that only their correlation counts.

    ::

        neck.all = sum_l 1/2 mean (z(A_l(S_l)) - z(T_l))^2            mean over n, c, h, w
        z(F)_c   = (F_c - mean) / (std + 1e-6), for each channel over batch and cells, unbiased std
                 = sum_l (M_l - 1) / M_l (1 - mean_c r_c), with Pearson's r_c of the M_l = B H_l W_l values of a channel

    Source: Cao, Zhang, Gao, Cheng, Cheng, Zhang, "PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient", NeurIPS 2022, arXiv 2207.02039, and its released code (in MMRazor).

    Statistics are those of one process, as published, so they depend on the batch size per GPU; with
    ``normalizer="global"`` they are computed over the batches of all processes. Where we differ: necks of unequal
    channels get 1x1 adapters (the original refuses them); a channel that is constant in the batch is standardized to 0.

    Shapes: maps (B, C, H, W). Published: the four finest levels; weight 6 for Faster R-CNN (ResNet-101 teaches
    ResNet-50) and for a RetinaNet taught by a Mask R-CNN (``match="position"``), 10 for a RetinaNet taught by a
    RetinaNet or FCOS on ResNeXt-101. The loss reads no boxes; the student's weights are not inherited.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, or a number of the finest levels, None for all; ``match``: levels
            are paired by ``stride``, or by ``position``: the student's finest level with the teacher's finest, and so
            on, which is how the original pairs families; ``resize``: which map is resized (bilinear) where the maps of
            a pair differ in size, ``student`` or ``teacher``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "process",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({"neck.all": neck["all"]}, ramp, normalizer, seed)
        if neck["match"] not in MATCHES or neck["resize"] not in RESIZED:
            raise DistillError(
                f"neck: expected match of {' or '.join(MATCHES)} and resize of {' or '.join(RESIZED)}, got "
                f"match={neck['match']} and resize={neck['resize']}"
            )
        self.by_stride, self.resize = neck["match"] == "stride", neck["resize"]
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.pairs: list[tuple[int, int]] = []
        """The strides of each pair, the student's and the teacher's."""
        self.adapters = torch.nn.ModuleDict()
        if not self.weights:
            return
        if self.by_stride:
            self.pairs = [(at, at) for at in base.shared_levels("neck", student.neck, teacher.neck, neck["levels"])]
        else:
            self.pairs = _by_position(student, teacher, neck["levels"])
        channels = {level: teacher.neck[other] for level, other in self.pairs}
        own_seed = base.derive_seed(seed, "neck")
        self.adapters = adapters.adapters(student.neck, channels, channels, seed=own_seed, **adapter)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The term of `weights`, a scalar."""
        if not self.pairs:
            return {}
        maps = []
        for level, other in self.pairs:
            maps.append((self.adapters[str(level)](student.neck[level]), teacher.neck[other]))
        shares = correlation_errors(maps, self.resize, self.normalizer == "global")
        return self.average({"neck.all": base.summed(shares)})


def _by_position(student: DetectorSpec, teacher: DetectorSpec, levels: Any) -> list[tuple[int, int]]:
    """Strides of student and teacher, paired from the finest on."""
    for role, spec in (("student", student), ("teacher", teacher)):
        base.shared_levels(f"neck ({role})", spec.neck, spec.neck, None)  # refuses a detector without a pyramid
    if not (levels is None or (isinstance(levels, int) and 0 < levels < 8)):
        raise DistillError(
            f"neck.levels: with neck.match=position, expected a number of levels, 1 to 7, or null, got {levels}"
        )
    return list(zip(sorted(student.neck), sorted(teacher.neck), strict=False))[:levels]
