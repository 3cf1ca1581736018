"""TADF-style: imitate around objects, and of the heads only what the teacher does better on positives, less and less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import base
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import MapImitation
from distill.precision import upcast
from distill.types import DetectorSpec, View

NECK = {"foreground": 0.01, "levels": None}
MASK = {"kind": "gaussian", "scale": 56.0, "threshold": 0.5}
HEAD = {"classification": 10.0, "regression": 1.0}
ADAPTER = {"kernel": 3, "start": "defeat", "relu": False}
RAMP = {**base.RAMP, "shape": "linear"}
BETA = 1 / 9
"""Where the smooth L1 becomes straight, as in torchvision's own box loss."""


def binary_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over classes of -t log s - (1 - t) log(1 - s), with s, t softmax of logits (R, K+1) -> (R,).

    1 - s is kept above the dtype's epsilon, which bounds the loss of a student that is wrong and sure.
    """
    log_s, t = F.log_softmax(upcast(student), dim=1), F.softmax(upcast(teacher.detach()), dim=1)
    log_rest = torch.log(-torch.expm1(log_s.clamp(max=-torch.finfo(log_s.dtype).eps)))
    return -(t * log_s + (1 - t) * log_rest).mean(1)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over the four deltas (R, 4) -> (R,)."""
    pair = upcast(student), upcast(teacher.detach())
    return F.smooth_l1_loss(*pair, beta=BETA, reduction="none").sum(1)


def iou(boxes: Tensor, truth: Tensor) -> Tensor:
    """Of each box with the truth in its own row, both (R, 4) -> (R,); 0 where they have no area."""
    low, high = torch.maximum(boxes[:, :2], truth[:, :2]), torch.minimum(boxes[:, 2:], truth[:, 2:])
    inside = (high - low).clamp(min=0).prod(1)
    both = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) + (truth[:, 2:] - truth[:, :2]).clamp(min=0).prod(1)
    return inside / (both - inside).clamp(min=torch.finfo(boxes.dtype).tiny)


class TADF(DistillLoss):
    """Imitate the neck under Gaussian bumps, and the heads on positive regions, boxes only where the teacher mends them.

    ::

        neck.foreground = mean over levels of  sum M |A(S) - T|^2 / max(1, 2 sum M),  M the Gaussian mask
        head.classification = mean over positives and classes of  BCE(softmax S, softmax T)
        head.regression = mean over positives of  [IoU(teacher's box, y) > IoU(proposal, y)] smoothL1(S - T)
        weight(t) = weight * (1 - (t - 1) / t_max)

    In the style of: Sun et al., "Distilling Object Detectors with Task Adaptive Regularization", 2020, arXiv 2006.13108.
    There is no released code, and this was not written from the paper's text. The three places, the regions of the
    student for both models, the positives and the decay are from its abstract and from later works; the mask is as
    DeFeat's repository holds it, with the level rule of DeFeat and FGFI; the condition on boxes is second-hand.

    Ours, for want of facts: the weights (0.01 is FGFI's for the same sum, 10 stands beside such a cross-entropy in
    DeFeat's repository, 1), the smooth L1 with torchvision's beta on the deltas of the true class, its mean over all
    positives, and that the weight falls with each step, not each epoch. Where the teacher knows more classes, its
    softmax is over the student's classes and background.

    Shapes: maps (B, C, H, W), logits (R, K+1), deltas (R, (K+1)*4), boxes (R, K+1, 4).

    Args:
        student, teacher: specs of both detectors.
        neck: ``foreground``: weight; ``levels``: strides, None for all that both have.
        mask: options of :class:`distill.losses.masks.Mask`.
        head: weights of ``classification`` and ``regression``, for two-stage detectors.
        adapter: ``kernel`` 1, 3, ``auto`` or None, ``start`` values (see `distill.losses.adapters`), ``relu`` after it.
        ramp: the decay. ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    columns: Tensor | None

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
        place = base.options("neck", neck, NECK)
        weights = {f"head.{term}": weight for term, weight in base.options("head", head, HEAD).items()}
        weights["neck.foreground"] = place["foreground"]
        super().__init__(weights, base.options("ramp", ramp, RAMP), normalizer, seed)
        self.mask = base.check_mask("neck", bool(self.terms("neck")), mask, MASK)
        self.neck: MapImitation | None = None
        if self.terms("neck"):
            how = base.options("adapter", adapter, ADAPTER)
            self.neck = MapImitation(
                "neck", student.neck, teacher.neck, place["levels"], how, count="half_l2", seed=seed
            )
        columns = None
        if self.terms("head"):
            base.require_outputs("head", student, teacher, "rois", "roi_logits")
            columns = base.class_columns("head", student, teacher)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. A stage that no term needs is not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.neck is not None:
            mask = self.mask(student, self.neck.sizes(student.neck), self.seeds(student.batch.ids))
            shares |= self.neck(student.neck, teacher.neck, {"foreground": mask})
        if self.terms("head"):
            shares |= self._heads(student, teacher)
        return self.average(shares)

    def _heads(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """On the student's regions."""
        regions, shares = student.rois, {}
        (ours, our_deltas), (theirs, their_deltas) = (view.roi_logits(regions.boxes) for view in (student, teacher))
        labels = torch.cat(list(regions.labels))
        known, theirs = (labels, theirs) if self.columns is None else (self.columns[labels], theirs[:, self.columns])
        base.check_shapes("head, logits (R, K+1)", ours, theirs, "Build the loss with the specs of both detectors")
        positive = labels > 0
        if "head.classification" in self.weights:
            total = (positive * binary_cross_entropy(ours, theirs)).sum()
            shares["head.classification"] = [(total, positive.sum())]
        if "head.regression" in self.weights:
            cost = smooth_l1(base.deltas_of(our_deltas, labels), base.deltas_of(their_deltas, known))
            mended = base.deltas_of(teacher.roi_boxes(regions.boxes).detach().flatten(1), known)
            truth, proposals = torch.cat(list(regions.truth)), torch.cat(list(regions.boxes))
            better = iou(mended, truth) > iou(proposals, truth)
            shares["head.regression"] = [(((positive & better) * cost).sum(), positive.sum())]
        return shares
