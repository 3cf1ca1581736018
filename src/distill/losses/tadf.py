"""TADF-style: imitate the neck around objects and the head on positive regions, with decaying weights."""

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
from distill.losses.imitation import MapImitation
from distill.precision import upcast
from distill.types import DetectorSpec, View

NECK = {"foreground": 0.01, "levels": None}
MASK = {"kind": "gaussian", "scale": 56.0, "threshold": 0.5}
HEAD = {"classification": 10.0, "regression": 1.0}
ADAPTER = {"kernel": 3, "start": "defeat", "relu": False}
RAMP = {**base.RAMP, "shape": "linear"}
BETA = 1 / 9
"""Where the smooth L1 becomes linear, as in torchvision's box loss."""


def binary_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over classes of -t log s - (1 - t) log(1 - s), with s, t softmax of logits (R, K+1) -> (R,)."""
    logits, t = upcast(student), F.softmax(upcast(teacher.detach()), dim=1)
    return -(t * F.log_softmax(logits, dim=1) + (1 - t) * log_complement(logits)).mean(1)


def log_complement(logits: Tensor) -> Tensor:
    """log(1 - softmax) of logits (R, K+1), exact where the softmax is nearly 1.

    1 - s cancels only for the largest class. There the value is logsumexp over the other classes minus logsumexp over
    all classes.
    """
    # `F.one_hot` would wait for the device.
    largest = torch.arange(logits.shape[1], device=logits.device) == logits.argmax(1, keepdim=True)
    others = logits.masked_fill(largest, -torch.inf).logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True)
    rest = torch.log1p(-F.softmax(logits, dim=1).masked_fill(largest, 0.0))
    return torch.where(largest, others, rest)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over the four deltas (R, 4) -> (R,)."""
    pair = upcast(student), upcast(teacher.detach())
    return F.smooth_l1_loss(*pair, beta=BETA, reduction="none").sum(1)


class TADF(DistillLoss):
    """Imitate the neck under a Gaussian mask, and the box head on positives.

    Boxes are imitated only where the teacher improves them.

    ::

        neck.foreground = mean over levels of  sum M |A(S) - T|^2 / max(1, 2 sum M),  M the Gaussian mask
        head.classification = mean over positives and classes of  BCE(softmax S, softmax T)
        head.regression = mean over positives of  [IoU(teacher's box, y) > IoU(proposal, y)] smoothL1(S - T)
        weight(t) = weight * (1 - (t - 1) / t_max)

    In the style of: Sun et al., "Distilling Object Detectors with Task Adaptive Regularization", 2020, arXiv
    2006.13108. There is no released code, and this file was not written from the paper's text. The three places, the
    student's regions for both models, the positives and the decay come from its abstract and from later works. The mask
    is the one in DeFeat's repository, with the level rule of DeFeat and FGFI. The condition on boxes is second-hand.

    Our choices, where facts are missing: the weights (0.01 is FGFI's for the same sum; 10 is the weight of such a
    cross-entropy in DeFeat's repository; 1); the smooth L1 on the deltas of the true class, with torchvision's beta;
    its mean over all positives; a weight that falls with each step, not each epoch. Where the teacher knows more
    classes, its softmax is over the student's classes and background.

    Shapes: maps (B, C, H, W), logits (R, K+1), deltas (R, (K+1)*4), boxes (R, K+1, 4). The paper's weights are not
    known.

    Args:
        student, teacher: specs of both detectors.
        neck: ``foreground``: weight; ``levels``: strides, None for all that both models have.
        head: weights of ``classification`` and ``regression``, for two-stage detectors.
        mask: options of :class:`distill.losses.masks.Mask`, for ``neck``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp: the decay. ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        head: Mapping[str, float] = HEAD,
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        weights = {f"head.{term}": weight for term, weight in base.merge_options("head", head, HEAD).items()}
        weights["neck.foreground"] = neck["foreground"]
        super().__init__(weights, base.merge_options("ramp", ramp, RAMP), normalizer, seed)
        self.mask = base.build_mask("neck", bool(self.terms("neck")), mask, MASK)
        self.neck: MapImitation | None = None
        if self.terms("neck"):
            adapter = base.merge_options("adapter", adapter, ADAPTER)
            self.neck = MapImitation(
                "neck", student.neck, teacher.neck, neck["levels"], adapter, normalization="half_l2", seed=seed
            )
        if self.terms("head"):
            base.require_outputs("head", student, teacher, "rois", "roi_logits")
            self.classes = ClassMap("head", student, teacher, partial=True)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [term for term in self.weights if term.startswith("head") or self.mask.reads_boxes]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. Stages that no term needs are not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.neck is not None:
            seeds = self.seeds(student.batch.ids)
            shares |= self.neck.compare_necks(student, teacher, self.mask, seeds, self.terms("neck"))
        if self.terms("head"):
            shares |= self._compare_heads(student, teacher)
        return self.average(shares)

    def _compare_heads(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """Shares of the terms of ``head``, on the student's positive regions."""
        regions, shares = student.rois, {}
        outputs = heads.region_outputs("head", student, teacher, regions, self.classes)
        positive = outputs.labels > 0
        if "head.classification" in self.weights:
            error = binary_cross_entropy(outputs.student_logits, outputs.teacher_logits)
            shares["head.classification"] = [base.sum_and_count(error, positive)]
        if "head.regression" in self.weights:
            error = smooth_l1(*outputs.label_deltas())
            all_boxes = teacher.roi_boxes(regions.boxes).detach().flatten(1)
            teacher_boxes = heads.label_deltas(all_boxes, outputs.teacher_labels)
            truth, proposals = torch.cat(list(regions.truth)), torch.cat(list(regions.boxes))
            improved = paired_iou(teacher_boxes, truth) > paired_iou(proposals, truth)
            shares["head.regression"] = [base.sum_and_count(improved * error, positive)]
        return shares
