"""BCKD: imitate class scores and box overlap, with larger weights where student and teacher disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.boxes import paired_iou
from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.precision import upcast
from distill.types import DetectorSpec, View, require

LOGITS = {"classes": 1.0, "boxes": 4.0}


def disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """``|sigmoid T - sigmoid S|`` of logits, without a gradient; equal shapes -> the same shape."""
    return (upcast(teacher.detach()).sigmoid() - upcast(student.detach()).sigmoid()).abs()


class BCKD(DistillLoss):
    """Imitate the class scores and the boxes of a dense head, both weighed by the difference of the scores.

    ::

        logits.classes = 1/N sum_{i, c} w_ic BCE(z_s, sigmoid z_t)            w_ic = |sigmoid z_t - sigmoid z_s|
        logits.boxes   = 1/N sum_i max_c w_ic (1 - IoU(box_s, box_t))

    over all anchors i that are not ignored, and classes c; N is the number of positive anchors. The gradient does not
    flow through the weights.

    Source: Yang, Zhou, Li, Yuan, Li, Li, "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection", ICCV 2023, arXiv 2308.14286. The equation follows the abstract. The weights 1 and 4, the divisor and
    the detached w were written from memory and are not checked against the paper.

    Where we differ: N is counted over all processes. The logits of a teacher with more classes are reduced to the
    student's.

    Shapes: logits (B, A*K, H, W), boxes (B, N, 4).

    Args:
        student, teacher: specs of two one-stage detectors with equal anchors.
        logits: weights of its terms.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        logits: Mapping[str, float] = LOGITS,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        logits = base.merge_options("logits", logits, LOGITS)
        super().__init__({f"logits.{name}": weight for name, weight in logits.items()}, ramp, normalizer, seed)
        if self.weights:
            require(student, "anchor_targets", "logits", "student", "Set the weights of logits to 0")
            self.classes = heads.dense_class_map("logits", student, teacher, boxes="logits.boxes" in self.weights)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        labels = student.anchor_targets.labels
        counted, count = labels >= 0, (labels > 0).sum()
        logits, teacher_logits = heads.anchor_classes("logits", student, teacher, self.classes)
        weight = disagreement(logits, teacher_logits)
        shares: dict[str, list[SumAndCount]] = {}
        if "logits.classes" in self.weights:
            entropy = F.binary_cross_entropy_with_logits(logits, teacher_logits.sigmoid(), reduction="none")
            shares["logits.classes"] = [((counted * (weight * entropy).sum(2)).sum(), count)]
        if "logits.boxes" in self.weights:
            deltas, teacher_deltas = heads.anchor_outputs("logits.boxes", "deltas", student, teacher, 4)
            boxes, teacher_boxes = student.anchor_boxes(deltas), student.anchor_boxes(teacher_deltas.detach())
            with torch.autocast(boxes.device.type, enabled=False):
                error = 1 - paired_iou(boxes.flatten(0, 1), teacher_boxes.flatten(0, 1)).view(counted.shape)
            shares["logits.boxes"] = [((counted * weight.amax(2) * error).sum(), count)]
        return self.average(shares)
