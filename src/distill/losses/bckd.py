"""BCKD: imitate class scores and box overlap, with larger weights where student and teacher disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.boxes import paired_giou, paired_iou
from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View, require

LOGITS = {"classes": 1.0, "boxes": 4.0}
OVERLAPS = {"giou": paired_giou, "iou": paired_iou}
LEVELS = ("all", "positive")


def disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """``|sigmoid T - sigmoid S|`` of logits, without a gradient; equal shapes -> the same shape."""
    return (upcast(teacher.detach()).sigmoid() - upcast(student.detach()).sigmoid()).abs()


class BCKD(DistillLoss):
    """Imitate the class scores and the boxes of a dense head, both weighed by the difference of the scores.

    ::

        logits.classes = 1/N sum_{i, c} w_ic BCE(z_s, sigmoid z_t)            w_ic = |sigmoid z_t - sigmoid z_s|
        logits.boxes   = 1/N sum_i max_c w_ic (1 - GIoU(box_s, box_t))

    over all anchors i that are not ignored, and classes c. N is the number of positive anchors, at least 1 in each
    image. In `logits.classes`, the gradient also flows through w, as in the quality focal loss; in `logits.boxes` it
    does not.

    Source: Yang, Zhou, Li, Yuan, Li, Li, "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection", ICCV 2023, arXiv 2308.14286, with the weights, the divisor and the GIoU of its released code for GFL.
    As we remember the paper, it has the IoU: ``box_error="iou"``.

    Where we differ: N is counted over all processes. The released code leaves out the levels without a positive anchor
    in the batch, with all their background: ``levels="positive"``. The logits of a teacher with more classes are
    reduced to the student's.

    Shapes: logits (B, A*K, H, W), boxes (B, N, 4).

    Args:
        student, teacher: specs of two one-stage detectors with equal anchors.
        logits: weights of its terms.
        box_error: ``giou`` or ``iou``.
        levels: ``all``, or ``positive``: those with a positive anchor in the batch of this process.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        logits: Mapping[str, float] = LOGITS,
        box_error: str = "giou",
        levels: str = "all",
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        logits = base.merge_options("logits", logits, LOGITS)
        super().__init__({f"logits.{name}": weight for name, weight in logits.items()}, ramp, normalizer, seed)
        if box_error not in OVERLAPS or levels not in LEVELS:
            raise DistillError(
                f"bckd: expected box_error of {' or '.join(OVERLAPS)} and levels of {' or '.join(LEVELS)}, got "
                f"box_error={box_error} and levels={levels}"
            )
        self.overlap, self.positive_levels = OVERLAPS[box_error], levels == "positive"
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
        counted, positive = labels >= 0, labels > 0
        count = heads.count_positives(positive)
        if self.positive_levels:
            counted = counted & self._on_positive_levels(student, positive)
        logits, teacher_logits = heads.anchor_classes("logits", student, teacher, self.classes)
        shares: dict[str, list[SumAndCount]] = {}
        if "logits.classes" in self.weights:
            error = heads.quality_focal(logits, teacher_logits).sum(2)
            shares["logits.classes"] = [((counted * error).sum(), count)]
        if "logits.boxes" in self.weights:
            weight = disagreement(logits, teacher_logits).amax(2)
            deltas, teacher_deltas = heads.anchor_outputs("logits.boxes", "deltas", student, teacher, 4)
            boxes, teacher_boxes = student.anchor_boxes(deltas), student.anchor_boxes(teacher_deltas.detach())
            with torch.autocast(boxes.device.type, enabled=False):
                overlap = self.overlap(boxes.flatten(0, 1), teacher_boxes.flatten(0, 1)).view(counted.shape)
            shares["logits.boxes"] = [((counted * weight * (1 - overlap)).sum(), count)]
        return self.average(shares)

    @staticmethod
    def _on_positive_levels(student: View, positive: Tensor) -> Tensor:
        """Whether an anchor's level has a positive anchor in the batch; (B, N) bool -> (1, N) bool."""
        levels = heads.split_levels(positive, student)
        return torch.cat([level.any().expand(1, level.shape[1]) for level in levels], dim=1)
