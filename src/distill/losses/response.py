"""Response distillation: imitate the softened class scores of the head, for regions or for all anchors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.types import DetectorSpec, View, require

LOGITS = {"classes": 1.0}


class Response(DistillLoss):
    """Imitate the class logits of the head at a temperature: the plain baseline of response distillation.

    ::

        two-stage: logits.classes = tau^2 / R sum_i KL(softmax(z_t / tau) || softmax(z_s / tau))
        one-stage: logits.classes = tau^2 / N_pos sum_{i, c} KL(sigmoid(z_t / tau) || sigmoid(z_s / tau))

    over the student's R sampled regions, for which both box heads run, or over all anchors i that are not ignored and
    classes c, with the divergence of two Bernoulli distributions; N_pos is the number of positive anchors.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531. Its use for
    detectors has no single source: tau = 1 and weight 1 are our choices; N_pos is the divisor of the focal loss. R and
    N_pos are counted over all processes. Where the teacher knows more classes, its logits are reduced to the student's.

    Shapes: logits (R, K+1) or (B, A*K, H, W).

    Args:
        student, teacher: specs of both detectors: both two-stage, or one-stage with equal anchors.
        logits: weight of its term.
        temperature: tau.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        logits: Mapping[str, float] = LOGITS,
        temperature: float = 1.0,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        logits = base.merge_options("logits", logits, LOGITS)
        super().__init__({"logits.classes": logits["classes"]}, ramp, normalizer, seed)
        self.temperature = base.check_temperature("temperature", temperature)
        self.two_stage = "rois" in student.outputs
        if self.weights:
            self.classes = heads.head_class_map("logits", student, teacher)
            if not self.two_stage:
                require(student, "anchor_targets", "logits", "student", "Set the weights of logits to 0")

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The term of `weights`, a scalar."""
        if not self.weights:
            return {}
        share = (self._compare_regions if self.two_stage else self._compare_anchors)(student, teacher)
        return self.average({"logits.classes": [share]})

    def _compare_regions(self, student: View, teacher: View) -> SumAndCount:
        outputs = heads.region_outputs("logits", student, teacher, student.rois, self.classes)
        divergence = heads.kl_divergence(outputs.student_logits, outputs.teacher_logits, self.temperature)
        return base.sum_and_size(divergence.sum(), len(divergence))

    def _compare_anchors(self, student: View, teacher: View) -> SumAndCount:
        student_logits, teacher_logits = heads.anchor_classes("logits", student, teacher, self.classes)
        divergence = heads.sigmoid_divergence(student_logits, teacher_logits, self.temperature).sum(2)
        labels = student.anchor_targets.labels
        return ((labels >= 0) * divergence).sum(), (labels > 0).sum()
