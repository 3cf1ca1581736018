"""CrossKD: the teacher's head continues from the student's features, and imitates itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.boxes import paired_giou, paired_iou
from distill.losses import base, heads
from distill.losses.adapters import adapter as convolution
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.losses.standardization import channel_moments, standardized
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Pyramid, View

HEADS = {"classes": 1.0, "boxes": 1.0}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}
LEAST = 1e-6
"""Smallest N that is not 0, as in the released code: the centerness of a single point may be far below 1."""


def aligned(student: Tensor, teacher: Tensor, everywhere: bool = False) -> Tensor:
    """The student's map, with mean and standard deviation of each channel as in the teacher's; (B, C, H, W) twice."""
    (own,), (target,) = channel_moments([student], everywhere), channel_moments([teacher], everywhere)
    return standardized(student, own) * target[1] + target[0]


def giou_error(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - GIoU of boxes in the same row, (N, 4) twice -> (N,)."""
    return 1 - paired_giou(student, teacher)


def log_iou_error(student: Tensor, teacher: Tensor) -> Tensor:
    """-log IoU of boxes in the same row, with an IoU of at least 1e-6; (N, 4) twice -> (N,)."""
    return -paired_iou(student, teacher).clamp(min=1e-6).log()


BOX_ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"giou": giou_error, "log_iou": log_iou_error}


def centerness(distances: Tensor) -> Tensor:
    """FCOS's target: root of min/max of left and right times min/max of top and bottom; (..., 4) -> (...)."""
    sides = torch.stack([distances[..., 0::2], distances[..., 1::2]], dim=-2)  # (..., 2, 2)
    return (sides.amin(-1) / sides.amax(-1).clamp(min=1e-6)).clamp(min=0).prod(-1).sqrt()


class CrossKD(DistillLoss):
    """The teacher's head continues from features of the student's head; its outputs imitate those of the teacher.

    The last layers of the student's head learn from the ground truth only, so that teacher and ground truth give no
    contradicting gradients to one layer.

    ::

        s', t'        = outputs of convolution i of a tower, before the ReLU;  s' is standardized per channel over batch
                        and cells, and gets the mean and the deviation of t'
        p, b          = class logits and boxes of the rest of the teacher's head, applied to relu(s')
        heads.classes = 1/N sum_{anchors, classes} v |sigmoid p - q| BCE(p, q),      q = sigmoid(teacher's logits)
        heads.boxes   = 1/N sum_anchors v u l(b, teacher's box),                     u = max over classes of q

    v is 0 for anchors that the student's assignment ignores, else 1; l = 1 - GIoU, or -log IoU. N is the number of
    positive anchors, at least 1 in each image (RetinaNet), or the sum of the centerness targets of the positive points
    (FCOS). No ReLU for i = 0. The gradient goes through the frozen layers to the student's tower.

    Source: Wang, Chen, Zheng, Li, Cheng, Hou, "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR
    2024, arXiv 2306.11369; equation and settings as in its released code.

    Statistics and N are those of one process, as published, or with ``normalizer="global"`` those of all processes.
    Where we differ: in a batch without positive points, the N of FCOS is 1, not 1e-6. Heads of unequal channels get a
    1x1 adapter for each tower; the original refuses them. FCOS is torchvision's: points are the corners of cells, and
    the boxes come from a ReLU instead of an exponential.

    Shapes: tower features (B, C, H, W). Published: RetinaNet i = 3, weights 1 and 1 with GIoU; FCOS i = 2, weights 0.4
    and 0.75 with -log IoU. The centerness is not distilled. Three convolutions of each of the student's towers run a
    second time. PKD with weight 2 on all levels adds to it: ``distill=[crosskd,pkd]``.

    Args:
        student, teacher: specs of two one-stage detectors of one family with equal anchors.
        heads: weights of its terms.
        depth: i.
        box_error: l, ``giou`` or ``log_iou``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`, before the alignment.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        heads: Mapping[str, float] = HEADS,
        depth: int = 3,
        box_error: str = "giou",
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "process",
        seed: int = 0,
    ) -> None:
        weights = base.merge_options("heads", heads, HEADS)
        super().__init__({f"heads.{name}": weight for name, weight in weights.items()}, ramp, normalizer, seed)
        if box_error not in BOX_ERRORS:
            raise DistillError(f"box_error: expected {' or '.join(BOX_ERRORS)}, got '{box_error}'")
        if not (isinstance(depth, int) and 0 <= depth <= 4):
            raise DistillError(f"depth: expected a number of convolutions from 0 to 4, got {depth}")
        self.depth, self.box_error = depth, BOX_ERRORS[box_error]
        self.by_centerness = "centerness" in student.outputs
        self.adapters = nn.ModuleDict()
        if not self.weights:
            return
        self._match(student, teacher)
        options = base.merge_options("adapter", adapter, ADAPTER)
        channels = next(iter(student.neck.values())), next(iter(teacher.neck.values()))
        for branch in self.terms("heads"):
            own_seed = base.derive_seed(seed, branch)
            self.adapters[branch] = convolution(*channels, seed=own_seed, **options)

    def _match(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        base.require_outputs("heads", student, teacher, "tower_features")
        if student.family != teacher.family:
            raise DistillError(
                f"CrossKD: the teacher's head continues from the student's, so both must be of one family, got a "
                f"{student.family} taught by a {teacher.family}. Choose teacher={student.family}_r50, or another method"
            )
        self.classes = heads.dense_class_map("heads", student, teacher, boxes="heads.boxes" in self.weights)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        targets = student.anchor_targets
        counted, positive = targets.labels >= 0, targets.labels > 0
        count = (positive * centerness(targets.deltas)).sum() if self.by_centerness else heads.count_positives(positive)
        scores = heads.flatten_anchors(
            {stride: upcast(x) for stride, x in teacher.class_logits.items()}, len(teacher.spec.classes)
        )
        scores = self.classes.covered(self.classes.dense_logits(scores)).detach()
        shares: dict[str, list[SumAndCount]] = {}
        if "heads.classes" in self.weights:
            logits = heads.flatten_anchors(self._cross("classes", student, teacher), len(teacher.spec.classes))
            own = self.classes.covered(self.classes.dense_logits(logits))
            error = heads.quality_focal(own, scores).sum(2)
            shares["heads.classes"] = [((counted * error).sum(), count)]
        if "heads.boxes" in self.weights:
            deltas = heads.flatten_anchors(self._cross("boxes", student, teacher), 4)
            target = heads.flatten_anchors({stride: upcast(x) for stride, x in teacher.deltas.items()}, 4)
            boxes, teacher_boxes = student.anchor_boxes(deltas), student.anchor_boxes(target.detach())
            with torch.autocast(boxes.device.type, enabled=False):
                error = self.box_error(boxes.flatten(0, 1), teacher_boxes.flatten(0, 1)).view(counted.shape)
            shares["heads.boxes"] = [((counted * scores.amax(2).sigmoid() * error).sum(), count)]
        return self.average(shares, least=LEAST, empty=1.0)

    def _cross(self, branch: str, student: View, teacher: View) -> Pyramid:
        """Outputs of the teacher's head, on the student's features."""
        own, target = student.tower_features(branch, self.depth), teacher.tower_features(branch, self.depth)
        features = {}
        for stride, x in own.items():
            adapted, remedy = self.adapters[branch](x), "Give both models equal necks"
            base.require_equal_shapes(f"heads.{branch}, stride {stride}", adapted, target[stride], remedy)
            with torch.autocast(x.device.type, enabled=False):
                pair = upcast(adapted), upcast(target[stride].detach())
                features[stride] = aligned(*pair, everywhere=self.normalizer == "global")
        if self.depth:
            features = {stride: x.relu() for stride, x in features.items()}
        return {stride: upcast(x) for stride, x in teacher.finish_tower(branch, self.depth, features).items()}
