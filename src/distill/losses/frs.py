"""FRS: imitate features and class scores where the teacher sees an object of any class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.losses.imitation import NeckPairs, masked, squared_error
from distill.precision import upcast
from distill.types import DetectorSpec, View, require

NECK = {"features": 0.005, "levels": None}
LOGITS = {"classes": 0.02}
ADAPTER = {"kernel": 3, "start": "default", "relu": False}
RAMP = {**base.RAMP, "warmup": 0.07}
LEAST = 1e-6
"""Smallest divisor. It is below 1, because the scores of a coarse level of an empty image can add up to less than 1."""


def richness(scores: Tensor) -> Tensor:
    """The largest sigmoid of each cell, of logits of classes or objectness (B, A*K, H, W) -> (B, H, W)."""
    return upcast(scores.detach()).amax(1).sigmoid()


def score_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of the cross-entropy of sigmoids, from logits (B, A*K, H, W) of both -> (B, H, W)."""
    target = upcast(teacher.detach()).sigmoid()
    return F.binary_cross_entropy_with_logits(upcast(student), target, reduction="none").sum(1)


class FRS(DistillLoss):
    """Imitate features and dense scores, each cell weighed by its feature richness: the teacher's highest score there.

    ::

        neck.features  = sum_l sum m_l (A_l(S_l) - T_l)^2 / sum m_l              sums over n, c, h, w and n, h, w
        logits.classes = sum_l sum m_l BCE(sigmoid z_s, sigmoid z_t) / sum m_l   sums over anchors and classes too
        m_l = max over anchors and classes of sigmoid(z_t) in a cell,   A_l a 3x3 convolution

    Scores are those of the class branch (one-stage) or of the RPN (two-stage).

    Source: Du, Zhang, Kuang, Ye, Cheng, Wang, "Distilling Object Detectors with Feature Richness", NeurIPS 2021, arXiv
    2111.00674, and its released code.

    Where we differ: sum m is taken over all processes (``normalizer="process"`` for the original); if the
    teacher has more classes, its mask uses all of them, and its scores are reduced to the student's classes.

    Shapes: maps (B, C, H, W), logits (B, A*K, H, W). Published weights (features, classes): Faster R-CNN 0.002, 0.1;
    RetinaNet 0.005, 0.02; FCOS 0.01, 0.05; they rise linearly from 0 in the first 500 steps (0.07 epochs of COCO at 16
    images). ``logits.classes`` is a cross-entropy, so this term is not 0 where both models agree.

    Args:
        student, teacher: specs of both detectors, both one-stage or both two-stage, with equal anchors for ``logits``.
        neck: weight of ``features``; ``levels``: strides, or a number of the finest shared levels, None for all.
        logits: weight of ``classes``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    classes: ClassMap | None

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        logits: Mapping[str, float] = LOGITS,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck, logits = base.merge_options("neck", neck, NECK), base.merge_options("logits", logits, LOGITS)
        weights = {"neck.features": neck["features"], "logits.classes": logits["classes"]}
        super().__init__(weights, base.merge_options("ramp", ramp, RAMP), normalizer, seed)
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.stage = "objectness" if "objectness" in teacher.outputs else "class_logits"
        self.neck: NeckPairs | None = None
        if self.weights:
            require(teacher, self.stage, "frs", "teacher")
        if self.terms("neck"):
            self.neck = NeckPairs(student, teacher, neck["levels"], adapter, seed)
        if self.terms("logits"):
            base.require_outputs("logits", student, teacher, self.stage)
            heads.require_equal_anchors("logits", student, teacher, boxes=False)
            self.classes = ClassMap("logits", student, teacher, partial=True) if self.stage == "class_logits" else None

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        scores = getattr(teacher, self.stage) if self.weights else {}
        if self.neck is not None:
            for level, (student_map, teacher_map) in zip(self.neck.levels, self.neck(student, teacher), strict=True):
                error = squared_error(student_map, teacher_map)
                shares["neck.features"].append(masked(error, richness(scores[level]), 1))
        if self.terms("logits"):
            for level, x in getattr(student, self.stage).items():
                target = scores[level]
                if self.classes is not None:
                    target = self.classes.map_logits(target, len(teacher.spec.classes))
                base.require_equal_shapes(f"logits, {self.stage} at stride {level}", x, target, heads.REMEDY)
                if self.classes is not None:
                    x, target = self.classes.covered_maps(x), self.classes.covered_maps(target)
                shares["logits.classes"].append(masked(score_error(x, target), richness(scores[level]), 1))
        return self.average({term: base.summed(levels) for term, levels in shares.items()}, least=LEAST)
