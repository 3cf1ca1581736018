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

SIDES = {"main": 5.0, "valuable": 0.6}
LOGITS = {"classes": 10.0}
CANDIDATES = 9
"""Anchors of each level whose overlap with a box determines the threshold of the box (ATSS)."""
LOWEST = 0.25
"""Lower bound of the valuable region, relative to the threshold."""
REGIONS = ("diou", "inside")
SOFTMAXES = ("side", "anchor")


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
    """The weights of anchors in the valuable region of a box: ``t / 4 <= DIoU < t``, t the threshold of ATSS.

    Args:
        truth: ground truth boxes (G, 4) of one image.
        grid: the anchors.

    Returns:
        (N,): the highest IoU with a box in whose region the anchor is, 0 for anchors in no region.
    """
    if not len(truth):
        return torch.zeros_like(grid.boxes[:, 0])
    overlaps = box_iou(truth, grid.boxes)
    limits, distances = thresholds(overlaps, truth, grid)[:, None], distance_box_iou(truth, grid.boxes)
    inside = (distances >= LOWEST * limits) & (distances < limits)
    weights: Tensor = (inside * overlaps).amax(0)
    return weights


def inside_boxes(truth: Tensor, grid: AnchorGrid) -> Tensor:
    """Whether the center of an anchor is inside a box (G, 4) of the image -> (N,) bool."""
    centers = (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2
    distances = torch.cat([centers - truth[:, None, :2], truth[:, None, 2:] - centers], dim=2)
    is_inside: Tensor = (distances > 0).all(2).any(0)
    return is_inside


class LD(DistillLoss):
    """Imitate the distribution over the distances to each side, where an anchor is positive or nearly so.

    ::

        sides.main     = sum_{i positive} w_i / 4 sum_{4 sides} KL(q_i || p_i)       w_i = max_c sigmoid z_s,ic
        sides.valuable = 1/16 sum_{i valuable} u_i sum_{4 sides} KL(q_i || p_i)
        logits.classes = sum_l 1/N_l sum_{i positive, of level l} KL(softmax(z_t,i / tau_c) || softmax(z_s,i / tau_c))
        KL(q || p)     = tau^2 mean_k q_k (log q_k - log p_k)                        over bins, or over classes

    p and q are the softmax of the logits of student and teacher / tau; N_l is the number of positive anchors of level
    l. With ``region="diou"``, an anchor i is valuable if t / 4 <= DIoU < t for the threshold t of a ground truth box:
    mean plus standard deviation of the IoU of its 9 nearest anchors on each level (ATSS); u_i is its highest IoU with
    such a box. With ``region="inside"``, i is valuable if its center is inside a box, and u_i = w_i. The gradient does
    not flow through w and u. The class scores of the head are sigmoids, but `logits.classes` compares their softmax, as
    published.

    Source: Zheng, Ye, Wang, Ren, Zuo, Hou, Cheng, "Localization Distillation for Dense Object Detection", CVPR 2022,
    arXiv 2102.12252, and its released code, in the units of our terms:

    ==========  ====  ========  =======  ===  =====  ======  ================
    detector    main  valuable  classes  tau  tau_c  region  region_positives
    ==========  ====  ========  =======  ===  =====  ======  ================
    RetinaNet   5     0.6       10       10   8      diou    False
    FCOS        0.25  0.25      10       10   2      inside  False
    GFL         0.25  0.25      10       10   2      diou    True
    ==========  ====  ========  =======  ===  =====  ======  ================

    The released code of RetinaNet takes one softmax over the bins of all four sides of an anchor
    (``softmax_over="anchor"``). The sum over sides then has one summand, a mean over 4 x bins. These terms are about a
    sixteenth of those with ``side``: the weights 5 and 0.6 then act like 0.3 and 0.04; FCOS has 0.25 and 0.25.

    The sums over positive and valuable anchors have no divisor, as published: they grow with the objects of the batch.
    ``divisor="positives"`` divides them by the number of positive anchors. Where we differ: positive are the anchors
    that the student's own loss takes, and a RetinaNet's unit of distance is an eighth of the anchor's side
    (`detectors.RetinaNet`); counts are those of all processes, and so is a sum without a divisor, which with
    ``normalizer="process"`` is that of each process. The imitation of neck cells (GI) is not included; combine LD with
    a method for the neck.

    Shapes: side logits (B, A*4*bins, H, W), class logits (B, A*K, H, W).

    Args:
        student, teacher: specs of two one-stage detectors with distribution heads, equal anchors and equal bins.
        sides: weights of its terms, ``main`` and ``valuable``.
        logits: weight of its term.
        temperature: tau, of the sides.
        class_temperature: tau_c, of the classes.
        divisor: of both terms of sides: ``none`` or ``positives``.
        region: of the valuable anchors: ``diou`` or ``inside``.
        region_positives: whether positive anchors can be valuable, too.
        softmax_over: the bins of each ``side``, or of the four sides of an ``anchor`` together.
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
        region: str = "diou",
        region_positives: bool = False,
        softmax_over: str = "side",
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
        if region not in REGIONS or softmax_over not in SOFTMAXES:
            raise DistillError(
                f"LD: expected region of {' or '.join(REGIONS)} and softmax_over of {' or '.join(SOFTMAXES)}, got "
                f"region={region} and softmax_over={softmax_over}"
            )
        if not isinstance(region_positives, bool):
            raise DistillError(f"LD: expected region_positives of true or false, got {region_positives!r}")
        self.by_positives, self.region, self.region_positives = divisor == "positives", region, region_positives
        self.by_side = softmax_over == "side"
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
        shares = self._sides(student, teacher, positive) if self.terms("sides") else {}
        if "logits.classes" in self.weights:
            shares["logits.classes"] = self._classes(student, teacher, positive)
        return self.average(shares)

    def _sides(self, student: View, teacher: View, positive: Tensor) -> dict[str, list[SumAndCount]]:
        error, count, shares = self._side_errors(student, teacher), positive.sum(), dict[str, list[SumAndCount]]()
        logits = heads.flatten_anchors(student.class_logits, len(student.spec.classes))
        scores = upcast(logits.detach()).amax(2).sigmoid()
        if "sides.main" in self.weights:
            shares["sides.main"] = [self._share((positive * scores * error).sum() / 4, count)]
        if "sides.valuable" in self.weights:
            weight = self._valuable(student, scores)
            weight = weight if self.region_positives else ~positive * weight
            shares["sides.valuable"] = [self._share((weight * error).sum() / 16, count)]
        return shares

    def _classes(self, student: View, teacher: View, positive: Tensor) -> list[SumAndCount]:
        """A share for each level: the term is the sum of the levels' means."""
        logits, targets = heads.anchor_classes("logits", student, teacher, self.classes)
        taught = positive & self.classes.known[student.anchor_targets.labels.clamp(min=0)]
        errors = taught * softened(logits, targets, self.class_temperature)
        levels = zip(heads.split_levels(errors, student), heads.split_levels(positive, student), strict=True)
        return base.summed([(error.sum(), members.sum()) for error, members in levels])

    def _side_errors(self, student: View, teacher: View) -> Tensor:
        """Divergence of each anchor, summed over the sides, (B, N)."""
        bins = student.spec.side_bins
        assert bins is not None  # checked by `require_outputs`
        logits, targets = heads.anchor_outputs("sides", "side_logits", student, teacher, 4 * bins)
        shape = (*logits.shape[:2], *((4, bins) if self.by_side else (1, 4 * bins)))
        return softened(logits.view(shape), targets.view(shape), self.temperature).sum(2)

    def _share(self, total: Tensor, count: Tensor) -> SumAndCount:
        if self.by_positives:
            return total, count
        everywhere = self.normalizer == "global"
        return base.sum_and_size(total * (distributed.world_size() if everywhere else 1), 1)

    def _valuable(self, student: View, scores: Tensor) -> Tensor:
        """The weights u of all anchors, 0 for those that are not valuable; scores w (B, N) -> (B, N)."""
        levels = list(student.anchors.values())
        grid = AnchorGrid(torch.cat(levels), [len(level) for level in levels])
        truth = [target.boxes.float() for target in student.batch.targets]
        with torch.autocast(grid.boxes.device.type, enabled=False):
            if self.region == "inside":
                return torch.stack([inside_boxes(boxes, grid) for boxes in truth]) * scores
            return torch.stack([valuable(boxes, grid) for boxes in truth])
