"""Chen et al.: weighted soft labels, a bounded box loss and hints, for both heads of a Faster R-CNN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.losses.imitation import MapError, MapImitation, squared_error
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

HEAD = {"soft": 0.5, "box": 0.5}
HINT = {"neck": 0.5, "levels": None, "distance": "l2"}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}
OWN_TERMS = {"rpn": "loss_objectness", "rcn": "loss_classifier"}
"""The student's own classification loss of each head. It keeps the weight mu = 1 - soft."""


def soft_labels(student: Tensor, teacher: Tensor, background: float) -> Tensor:
    """-sum_c w_c p_t,c log p_s,c, w_0 = `background`, else w_c = 1; logits (..., K+1), background first -> (...)."""
    log_p = F.log_softmax(upcast(student), dim=-1)
    cost = -F.softmax(upcast(teacher.detach()), dim=-1) * log_p
    return background * cost[..., 0] + cost[..., 1:].sum(-1)


def bounded(student: Tensor, teacher: Tensor, truth: Tensor, positive: Tensor, margin: float) -> Tensor:
    """||S - Y||^2 where ||S - Y||^2 + margin > ||T - Y||^2, else 0; deltas (..., 4), positive (...) -> (...).

    Only positives count: elsewhere Y has no meaning, and may be infinite. A positive whose box has no area counts 0,
    because its Y is infinite too.
    """
    positive = positive & truth.isfinite().all(-1)
    truth = truth.masked_fill(~positive[..., None], 0.0)
    student_error = (upcast(student) - truth).square().sum(-1)
    teacher_error = (upcast(teacher.detach()) - truth).square().sum(-1)
    return student_error * (positive & (student_error + margin > teacher_error))


def absolute_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of |S - T|; maps (B, C, H, W), the student's after its adapter -> (B, H, W)."""
    return (upcast(student) - upcast(teacher.detach())).abs().sum(1)


DISTANCES: dict[str, MapError] = {"l2": squared_error, "l1": absolute_error}


class Chen(DistillLoss):
    """Teach both heads of a Faster R-CNN soft labels and, up to the teacher's error, boxes; add hints at the neck.

    With torchvision's hard losses, the teacher's T and the student's S, for each of the heads RPN and RCN::

        L_class = mu hard + (1 - mu) mean over regions of  -sum_c w_c p(T)_c log p(S)_c
        L_box = smooth L1 + nu / regions * sum over positives of  [|S - y|^2 + m > |T - y|^2] |S - y|^2
        L = L_RPN + L_RCN + gamma mean over levels of  |A(S) - T|^2 / (C H W B)

    Source: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NIPS 2017. No code
    was released: the equations and w_0 = 1.5 (background, 1 else) are those on which public reading notes and reruns
    agree; mu, nu, gamma = 0.5 are recalled, not checked against the text.

    Our choices: the RPN's soft label has two classes, and the objectness is the logit between them. The RPN's anchors
    are those of the student's own sample. Both models are compared on the student's regions. L_box divides by all
    sampled regions, as the smooth L1 does, so that nu weighs the two alike. The hint is the mean over elements of each
    shared level of the neck, where the paper has one last map. The paper does not state m: 0.01 comes from a public
    rerun, and in the box head's coding (deltas times 10) it is about 1 % of the region's side: the student need not be
    better than the teacher. A dense one-stage head has no balanced sample for a background weight, so it gets hints
    only. Where the teacher knows more classes, its softmax is over the student's classes and background.

    Shapes: maps (B, C, H, W), logits (R, K+1), deltas (R, (K+1)*4) and (B, A*4, H, W). The paper's weights: mu, nu and
    gamma, above.

    Args:
        student, teacher: specs of both detectors.
        rpn, rcn: ``soft``: 1 - mu, from 0 to 1; the student's own classification loss of that head keeps the weight mu,
            which a `ramp` does not change. ``box``: nu. The RPN's terms need equal anchors.
        hint: ``neck``: gamma; ``levels``: strides, None for all that both models have; ``distance``: ``l2`` or ``l1``.
        background: w_0.
        margin: m.
        mask: options of :class:`distill.losses.masks.Mask`, for ``hint``; kind ``none``, the original, is the whole
            neck.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`. The paper adapts equal
            channels too.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        rpn: Mapping[str, float] = HEAD,
        rcn: Mapping[str, float] = HEAD,
        hint: Mapping[str, Any] = HINT,
        background: float = 1.5,
        margin: float = 0.01,
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        options = {"rpn": base.merge_options("rpn", rpn, HEAD), "rcn": base.merge_options("rcn", rcn, HEAD)}
        weights = {f"{head}.{term}": weight for head, terms in options.items() for term, weight in terms.items()}
        hint = base.merge_options("hint", hint, HINT)
        super().__init__({**weights, "hint.neck": hint["neck"]}, ramp, normalizer, seed)
        for name, value in (("background", background), ("margin", margin)):
            if not base.is_number(value):
                raise DistillError(f"{name}: expected a number, 0 or more, got {value!r}")
        self.background, self.margin = float(background), float(margin)
        soft = {head: self.weights.get(f"{head}.soft", 0.0) for head in OWN_TERMS}
        if max(soft.values()) > 1:
            raise DistillError(f"Chen: expected the weights of rpn.soft and rcn.soft, 1 - mu, from 0 to 1, got {soft}")
        self.supervised = {OWN_TERMS[head]: 1 - weight for head, weight in soft.items() if weight}

        if hint["distance"] not in DISTANCES:
            raise DistillError(f"hint.distance: expected {' or '.join(DISTANCES)}, got '{hint['distance']}'")
        self.mask = base.build_mask("hint", bool(self.terms("hint")), mask, MASK)
        self.hint: MapImitation | None = None
        if self.terms("hint"):
            adapter, error = base.merge_options("adapter", adapter, ADAPTER), DISTANCES[hint["distance"]]
            self.hint = MapImitation(
                "hint", student.neck, teacher.neck, hint["levels"], adapter, error, normalization="mse", seed=seed
            )
        if self.terms("rpn"):
            base.require_outputs("rpn", student, teacher, "objectness")
            heads.require_equal_anchors("rpn", student, teacher)
        if self.terms("rcn"):
            base.require_outputs("rcn", student, teacher, "rois", "roi_logits")
            self.classes = ClassMap("rcn", student, teacher, partial=True)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [term for term in self.weights if not term.startswith("hint") or self.mask.reads_boxes]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. Stages that no term needs are not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.hint is not None:
            seeds = self.seeds(student.batch.ids)
            shares |= self.hint.compare_necks(student, teacher, self.mask, seeds, self.terms("hint"))
        if self.terms("rpn"):
            shares |= self._compare_rpn(student, teacher)
        if self.terms("rcn"):
            shares |= self._compare_rcn(student, teacher)
        return self.average(shares)

    def _compare_rpn(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """Shares of the terms of ``rpn``, on the anchors that the student's own losses sample."""
        targets, shares = student.anchor_targets, {}
        if "rpn.soft" in self.weights:
            # The sigmoid of z is the softmax over (0, z).
            student_logits, teacher_logits = (
                F.pad(logits, (1, 0)) for logits in heads.anchor_outputs("rpn", "objectness", student, teacher, 1)
            )
            error = soft_labels(student_logits, teacher_logits, self.background)
            shares["rpn.soft"] = [base.sum_and_count(error, targets.sampled)]
        if "rpn.box" in self.weights:
            deltas = heads.anchor_outputs("rpn", "deltas", student, teacher, 4)
            error = bounded(*deltas, targets.deltas, targets.labels > 0, self.margin)
            shares["rpn.box"] = [base.sum_and_count(error, targets.sampled)]
        return shares

    def _compare_rcn(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """Shares of the terms of ``rcn``, on the student's regions."""
        regions, shares = student.rois, {}
        outputs = heads.region_outputs("rcn", student, teacher, regions, self.classes)
        every_region = torch.ones_like(outputs.labels, dtype=torch.bool)
        if "rcn.soft" in self.weights:
            error = soft_labels(outputs.student_logits, outputs.teacher_logits, self.background)
            shares["rcn.soft"] = [base.sum_and_count(error, every_region)]
        if "rcn.box" in self.weights:
            truth = torch.cat(list(regions.deltas))
            error = bounded(*outputs.label_deltas(), truth, outputs.labels > 0, self.margin)
            shares["rcn.box"] = [base.sum_and_count(error, every_region)]
        return shares
