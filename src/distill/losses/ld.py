"""LD: imitate the teacher's distributions over the distances to each side of a box, and its class scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou, distance_box_iou

from distill import distributed
from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, View

SIDES = {"main": 5.0, "valuable": 0.15}
LOGITS = {"classes": 10.0}
CANDIDATES = 9
"""Anchors of each level whose overlap with a box determines the threshold of the box (ATSS)."""
LOWEST = 0.25
"""Lower bound of the valuable region, relative to the threshold."""


class AnchorGrid(NamedTuple):
    """The anchors of one image."""

    boxes: Tensor
    """(N, 4), of all levels."""
    counts: list[int]
    """Number of anchors of each level."""


def softened(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``tau^2 mean_k q_k (log q_k - log p_k)``, softmax of logits / tau; (..., K) twice -> (...)."""
    return heads.kl_divergence(student, teacher, temperature) / student.shape[-1]


def thresholds(overlaps: Tensor, truth: Tensor, grid: AnchorGrid) -> Tensor:
    """ATSS: mean plus standard deviation of the IoU of the anchors that are nearest to each box, on each level.

    Args:
        overlaps: (G, N) IoU of boxes and anchors.
        truth: (G, 4).
        grid: the anchors.

    Returns:
        (G,).
    """
    centers = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (truth, grid.boxes)]
    # Not `cdist`, whose matrix product rounds distances, and with them the choice among equally near anchors.
    distances = (centers[0][:, None] - centers[1][None]).square().sum(2)
    nearest = []
    for level, overlap in zip(*(torch.split(x, grid.counts, 1) for x in (distances, overlaps)), strict=True):
        chosen = level.topk(min(CANDIDATES, level.shape[1]), dim=1, largest=False).indices
        nearest.append(overlap.gather(1, chosen))
    candidates = torch.cat(nearest, dim=1)
    return candidates.mean(1) + candidates.std(1)


def valuable(truth: Tensor, grid: AnchorGrid) -> Tensor:
    """Whether an anchor is in the valuable region of a box: ``t / 4 <= DIoU < t``, t the threshold of ATSS.

    Args:
        truth: ground truth boxes (G, 4) of one image.
        grid: the anchors.

    Returns:
        (N,) bool.
    """
    if not len(truth):
        return torch.zeros(len(grid.boxes), dtype=torch.bool, device=grid.boxes.device)
    limits = thresholds(box_iou(truth, grid.boxes), truth, grid)[:, None]
    overlaps = distance_box_iou(truth, grid.boxes)
    inside: Tensor = (overlaps >= LOWEST * limits) & (overlaps < limits)
    return inside.any(0)


class LD(DistillLoss):
    """Imitate the distribution over the distances to each side, where an anchor is positive or nearly so.

    ::

        sides.main     = sum_{i positive} w_i / 4 sum_{4 sides} KL(q_i || p_i)       w_i = max_c sigmoid z_s,ic
        sides.valuable = 1/16 sum_{i valuable} sum_{4 sides} KL(q_i || p_i)
        logits.classes = 1/N_pos sum_{i positive} KL(softmax(z_t,i / tau_c) || softmax(z_s,i / tau_c))
        KL(q || p)     = tau^2 mean_k q_k (log q_k - log p_k)                        over bins, or over classes

    p and q are the softmax of the logits of student and teacher / tau. An anchor i is valuable if t / 4 <= DIoU < t for
    the threshold t of a ground truth box: mean plus standard deviation of the IoU of its 9 nearest anchors on each
    level (ATSS). The gradient does not flow through w. The class scores of the head are sigmoids, but `logits.classes`
    compares their softmax, as published.

    Source: Zheng, Ye, Wang, Ren, Zuo, Hou, Cheng, "Localization Distillation for Dense Object Detection", CVPR 2022,
    arXiv 2102.12252, and its released code: weights 5 and 10, tau = 10 and tau_c = 8 for RetinaNet; 0.25 and 10, tau =
    10 and tau_c = 2 for FCOS. The code gives the valuable region 0.03 times the weight of the main one in a RetinaNet;
    for FCOS the weight is not known, so it is 0.

    The sums over positive and valuable anchors have no divisor, as published: they grow with the objects of the batch.
    ``divisor="positives"`` divides them by N_pos. Where we differ: positive are the anchors that the student's own loss
    takes, and a RetinaNet's unit of distance is an eighth of the anchor's side (`detectors.RetinaNet`); N_pos is
    counted over all processes, and so is a sum without a divisor, which with ``normalizer="process"`` is that of each
    process. The imitation of neck cells (GI) is not included; combine LD with a method for the neck.

    Shapes: side logits (B, A*4*bins, H, W), class logits (B, A*K, H, W).

    Args:
        student, teacher: specs of two one-stage detectors with distribution heads, equal anchors and equal bins.
        sides: weights of its terms, ``main`` and ``valuable``.
        logits: weight of its term.
        temperature: tau, of the sides.
        class_temperature: tau_c, of the classes.
        divisor: of both terms of sides: ``none`` or ``positives``.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        sides: Mapping[str, float] = SIDES,
        logits: Mapping[str, float] = LOGITS,
        temperature: float = 10.0,
        class_temperature: float = 8.0,
        divisor: str = "none",
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        sides = base.merge_options("sides", sides, SIDES)
        logits = base.merge_options("logits", logits, LOGITS)
        weights = {f"sides.{name}": weight for name, weight in sides.items()} | {"logits.classes": logits["classes"]}
        super().__init__(weights, ramp, normalizer, seed)
        self.temperature = base.check_temperature("temperature", temperature)
        self.class_temperature = base.check_temperature("class_temperature", class_temperature)
        if divisor not in ("none", "positives"):
            raise DistillError(f"LD: expected divisor to be none or positives, got '{divisor}'")
        self.by_positives = divisor == "positives"
        if self.terms("sides"):
            base.require_outputs("sides", student, teacher, "side_logits")
            heads.require_equal_anchors("sides", student, teacher)
            if student.side_bins != teacher.side_bins:
                raise DistillError(
                    f"sides: expected distributions over as many distances, got box_bins={student.side_bins} of the "
                    f"student and {teacher.side_bins} of the teacher. Give both the same box_bins, or set the weights "
                    "of sides to 0"
                )
        if "logits.classes" in self.weights:
            self.classes = heads.dense_class_map("logits", student, teacher)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        positive = student.anchor_targets.labels > 0
        count, shares = positive.sum(), dict[str, list[SumAndCount]]()
        if self.terms("sides"):
            error = self._side_errors(student, teacher)
            if "sides.main" in self.weights:
                scores = heads.flatten_anchors(student.class_logits, len(student.spec.classes))
                weight = upcast(scores.detach()).amax(2).sigmoid()
                shares["sides.main"] = [self._share((positive * weight * error).sum() / 4, count)]
            if "sides.valuable" in self.weights:
                shares["sides.valuable"] = [self._share((self._valuable(student) * error).sum() / 16, count)]
        if "logits.classes" in self.weights:
            logits, targets = heads.anchor_classes("logits", student, teacher, self.classes)
            taught = positive & self.classes.known[student.anchor_targets.labels.clamp(min=0)]
            shares["logits.classes"] = [((taught * softened(logits, targets, self.class_temperature)).sum(), count)]
        return self.average(shares)

    def _side_errors(self, student: View, teacher: View) -> Tensor:
        """Divergence of each anchor, summed over the sides, (B, N)."""
        bins = student.spec.side_bins
        assert bins is not None  # checked by `require_outputs`
        logits, targets = heads.anchor_outputs("sides", "side_logits", student, teacher, 4 * bins)
        by_side = (*logits.shape[:2], 4, bins)
        return softened(logits.view(by_side), targets.view(by_side), self.temperature).sum(2)

    def _share(self, total: Tensor, count: Tensor) -> SumAndCount:
        if self.by_positives:
            return total, count
        everywhere = self.normalizer == "global"
        return base.sum_and_size(total * (distributed.world_size() if everywhere else 1), 1)

    @staticmethod
    def _valuable(student: View) -> Tensor:
        """(B, N) bool."""
        levels = list(student.anchors.values())
        grid = AnchorGrid(torch.cat(levels), [len(level) for level in levels])
        with torch.autocast(grid.boxes.device.type, enabled=False):
            return torch.stack([valuable(target.boxes.float(), grid) for target in student.batch.targets])
