"""Chen et al.: weighted soft labels, a bounded box loss and hints, for both heads of a Faster R-CNN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import base
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import Error, MapImitation, squared_error
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

HEAD = {"soft": 0.5, "box": 0.5}
HINT = {"neck": 0.5, "levels": None, "distance": "l2"}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}
OWN_TERMS = {"rpn": "loss_objectness", "rcn": "loss_classifier"}
"""The student's own classification loss of each head, which counts mu = 1 - soft."""


def soft_labels(student: Tensor, teacher: Tensor, background: float) -> Tensor:
    """-sum_c w_c p_t,c log p_s,c, with w_0 = `background` and 1 else; logits (..., K+1), background first -> (...)."""
    log_p = F.log_softmax(upcast(student), dim=-1)
    cost = -F.softmax(upcast(teacher.detach()), dim=-1) * log_p
    return background * cost[..., 0] + cost[..., 1:].sum(-1)


def bounded(student: Tensor, teacher: Tensor, truth: Tensor, positive: Tensor, margin: float) -> Tensor:
    """||S - Y||^2 where ||S - Y||^2 + margin > ||T - Y||^2, else 0; deltas (..., 4), positive (...) -> (...).

    Only where `positive`: elsewhere Y means nothing, and may even be infinite.
    """
    truth = truth.masked_fill(~positive[..., None], 0.0)
    ours = (upcast(student) - truth).square().sum(-1)
    theirs = (upcast(teacher.detach()) - truth).square().sum(-1)
    return ours * (positive & (ours + margin > theirs))


def absolute_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of |S - T|; maps (B, C, H, W), the student's after its adapter -> (B, H, W)."""
    return (upcast(student) - upcast(teacher.detach())).abs().sum(1)


DISTANCES: dict[str, Error] = {"l2": squared_error, "l1": absolute_error}


class Chen(DistillLoss):
    """Teach both heads of a Faster R-CNN soft labels and boxes, the latter only up to the teacher, and hint at the neck.

    With hard losses of torchvision, the teacher's T and the student's S, for each of the heads RPN and RCN::

        L_class = mu hard + (1 - mu) mean over regions of  -sum_c w_c p(T)_c log p(S)_c
        L_box = smooth L1 + nu / regions * sum over positives of  [|S - y|^2 + m > |T - y|^2] |S - y|^2
        L = L_RPN + L_RCN + gamma mean over levels of  |A(S) - T|^2 / (C H W B)

    Source: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NIPS 2017. No code was
    released: the equations and w_0 = 1.5 (background, 1 else) are as public reading notes and reruns agree on them;
    mu, nu, gamma = 0.5 are recalled, not checked against the text.

    Our choices: the RPN's soft label has two classes, of which the objectness is the logit; its anchors are those of the
    student's own sample; both models say of the student's regions what they are; L_box divides by all sampled regions,
    as the smooth L1 does, so that nu weighs the two alike. The hint is the mean over elements of each shared level of
    the neck, where the paper has one last map. The paper does not tell m: 0.01 is what a public rerun has, and in
    the box head's coding (deltas times 10) about 1 % of the region's side, hence "as good as the teacher" and no more.
    A dense one-stage head has no balanced sample to put a background weight on, so there are only hints for it.
    Where the teacher knows more classes, its softmax is over the student's classes and background.

    Shapes: maps (B, C, H, W), logits (R, K+1), deltas (R, (K+1)*4) and (B, A*4, H, W).

    Args:
        student, teacher: specs of both detectors.
        rpn, rcn: ``soft``: 1 - mu, from 0 to 1; the student's own classification loss of that head counts mu, which a
            `ramp` does not move. ``box``: nu. The RPN's terms need equal anchors.
        hint: ``neck``: gamma; ``levels``: strides, None for all that both have; ``distance``: ``l2`` or ``l1``.
        background: w_0.
        margin: m.
        mask: options of :class:`distill.losses.masks.Mask`, for ``hint``; kind ``none``, the original, is the whole neck.
        adapter: ``kernel`` 1, 3, ``auto`` or None, ``start`` values (see `distill.losses.adapters`), ``relu`` after it. The paper adapts
            equal channels too.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    columns: Tensor | None

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
        heads = {"rpn": base.options("rpn", rpn, HEAD), "rcn": base.options("rcn", rcn, HEAD)}
        chosen = base.options("hint", hint, HINT)
        weights = {f"{head}.{term}": weight for head, terms in heads.items() for term, weight in terms.items()}
        super().__init__({**weights, "hint.neck": chosen["neck"]}, ramp, normalizer, seed)
        self.background, self.margin = _number("background", background), _number("margin", margin)
        soft = {head: self.weights.get(f"{head}.soft", 0.0) for head in OWN_TERMS}
        if max(soft.values()) > 1:
            raise DistillError(f"Chen: expected the weights of rpn.soft and rcn.soft, 1 - mu, from 0 to 1, got {soft}")
        self.supervised = {OWN_TERMS[head]: 1 - weight for head, weight in soft.items() if weight}

        if chosen["distance"] not in DISTANCES:
            raise DistillError(f"hint.distance: expected {' or '.join(DISTANCES)}, got '{chosen['distance']}'")
        self.mask = base.check_mask("hint", bool(self.terms("hint")), mask, MASK)
        self.hint: MapImitation | None = None
        if self.terms("hint"):
            how, error = base.options("adapter", adapter, ADAPTER), DISTANCES[chosen["distance"]]
            self.hint = MapImitation(
                "hint", student.neck, teacher.neck, chosen["levels"], how, error, count="mse", seed=seed
            )
        if self.terms("rpn"):
            _check_rpn(student, teacher)
        self._anchors_are_equal = False
        columns = None
        if self.terms("rcn"):
            base.require_outputs("rcn", student, teacher, "rois", "roi_logits")
            columns = base.class_columns("rcn", student, teacher)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. A stage that no term needs is not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.hint is not None:
            inside = self.mask(student, self.hint.sizes(student.neck), self.seeds(student.batch.ids))
            shares |= self.hint(student.neck, teacher.neck, {"neck": inside})
        if self.terms("rpn"):
            shares |= self._rpn(student, teacher)
        if self.terms("rcn"):
            shares |= self._rcn(student, teacher)
        return self.average(shares)

    def _rpn(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """On the anchors that the student's own losses see."""
        if not self._anchors_are_equal:
            base.check_anchors("rpn", student, teacher)
            self._anchors_are_equal = True
        targets, shares = student.anchor_targets, {}
        if "rpn.soft" in self.weights:
            # The sigmoid of z is the softmax over (0, z).
            ours, theirs = (F.pad(x, (1, 0)) for x in _anchors_of("objectness", student, teacher, 1))
            shares["rpn.soft"] = _mean(soft_labels(ours, theirs, self.background), targets.sampled)
        if "rpn.box" in self.weights:
            ours, theirs = _anchors_of("deltas", student, teacher, 4)
            cost = bounded(ours, theirs, targets.deltas, targets.labels > 0, self.margin)
            shares["rpn.box"] = _mean(cost, targets.sampled)
        return shares

    def _rcn(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """On the student's regions."""
        regions, shares = student.rois, {}
        (ours, our_deltas), (theirs, their_deltas) = (view.roi_logits(regions.boxes) for view in (student, teacher))
        labels = torch.cat(list(regions.labels))
        known, theirs = (labels, theirs) if self.columns is None else (self.columns[labels], theirs[:, self.columns])
        base.check_shapes("rcn, logits (R, K+1)", ours, theirs, "Build the loss with the specs of both detectors")
        every = torch.ones_like(labels, dtype=torch.bool)
        if "rcn.soft" in self.weights:
            shares["rcn.soft"] = _mean(soft_labels(ours, theirs, self.background), every)
        if "rcn.box" in self.weights:
            pair = base.deltas_of(our_deltas, labels), base.deltas_of(their_deltas, known)
            shares["rcn.box"] = _mean(bounded(*pair, torch.cat(list(regions.deltas)), labels > 0, self.margin), every)
        return shares


def _number(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise DistillError(f"{name}: expected a number, 0 or more, got {value!r}")
    return float(value)


def _check_rpn(student: DetectorSpec, teacher: DetectorSpec) -> None:
    base.require_outputs("rpn", student, teacher, "objectness")
    if student.anchors != teacher.anchors:
        raise DistillError(
            f"rpn: expected as many anchors per cell at the same strides, got (stride: anchors) {student.anchors} of the "
            f"student and {teacher.anchors} of the teacher. Set the weights of rpn to 0, or give both models equal "
            "anchor_sizes and anchor_ratios"
        )


def _anchors_of(stage: str, student: View, teacher: View, columns: int) -> tuple[Tensor, Tensor]:
    """A dense stage of both, (B, N, columns)."""
    ours, theirs = getattr(student, stage), getattr(teacher, stage)
    for stride, x in ours.items():
        base.check_shapes(f"rpn, {stage} at stride {stride}", x, theirs[stride], "Give both models the same batch")
    return base.per_anchor(ours, columns), base.per_anchor(theirs, columns)


def _mean(cost: Tensor, counted: Tensor) -> list[SumAndCount]:
    """Over the regions or anchors that are `counted`."""
    return [((counted * cost).sum(), counted.sum())]
