"""The last step of a detector: from scores and boxes to detections, by the rules of three projects.

torchvision's detectors keep torchvision's own code. The rules of `RULES` belong to weights of other projects. They
differ in these points:

=================== ==================== =============================== ==========================
step                torchvision          detectron2                      mmdetection
=================== ==================== =============================== ==========================
boxes are clipped   before NMS           dense heads: after NMS          before NMS
empty boxes         two-stage: sides     dropped last, in the original   dense heads: dropped
                    below 0.01 px        image; so fewer than the limit  before NMS; two-stage: kept
                    dropped before NMS   may remain
FCOS, score         sqrt(class x ctr)    sqrt(class x ctr)               class x ctr
FCOS, threshold     on the score         on the score                    on the class alone
pasted mask         box of whole pixels  sampled at pixel centers        sampled at pixel centers
=================== ==================== =============================== ==========================

``mmdetection2`` is MMDetection 2.x: its dense heads keep the boxes that clipping has made empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection import fcos, retinanet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms
from torchvision.ops import boxes as box_ops

from distill.detectors.anchors import choose
from distill.types import Detections, DistillError, Size

RULES = ("torchvision", "detectron2", "mmdetection", "mmdetection2")
"""Values of the option `detection_rule`."""


def check_rule(rule: str) -> str:
    """Return `rule` if it is in `RULES`.

    Raises:
        DistillError: `rule` has another value.
    """
    return choose("detection_rule", rule, RULES)


def finish(detections: Detections, rule: str) -> Detections:
    """Drop the empty boxes of an image's final detections, if the rule is Detectron2's."""
    if rule != "detectron2":
        return detections
    kept = _has_area(detections.boxes)
    masks = None if detections.masks is None else detections.masks[kept]
    return Detections(detections.boxes[kept], detections.scores[kept], detections.labels[kept], masks)


class RuledRoIHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's RoIHeads with another rule for its detections."""

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[Size]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return boxes, scores and labels of each image, from logits (R, K+1) and deltas (R, (K+1)*4)."""
        outputs, counts = class_logits.shape[-1], [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(box_regression, proposals).reshape(-1, outputs, 4)
        probabilities = F.softmax(class_logits, -1)
        found = []
        for boxes, scores, size in zip(
            torch.split(decoded, counts), torch.split(probabilities, counts), image_shapes, strict=True
        ):
            valid = boxes.isfinite().flatten(1).all(1) & scores.isfinite().all(1)
            boxes, scores = box_ops.clip_boxes_to_image(boxes[valid], size)[:, 1:], scores[valid][:, 1:]
            rows, columns = (scores > self.score_thresh).nonzero(as_tuple=True)
            boxes, scores, labels = boxes[rows, columns], scores[rows, columns], columns + 1
            kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            found.append((boxes[kept], scores[kept], labels[kept]))
        boxes_, scores_, labels_ = (list(part) for part in zip(*found, strict=True))
        return boxes_, scores_, labels_


def with_rule(heads: RoIHeads, rule: str) -> RoIHeads:
    """Return torchvision's RoIHeads with a rule. The rule ``torchvision`` returns `heads` itself."""
    if check_rule(rule) == "torchvision":
        return heads
    matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
    return RuledRoIHeads(
        heads.box_roi_pool,
        heads.box_head,
        heads.box_predictor,
        matcher.high_threshold,
        matcher.low_threshold,
        sampler.batch_size_per_image,
        sampler.positive_fraction,
        heads.box_coder.weights,
        heads.score_thresh,
        heads.nms_thresh,
        heads.detections_per_img,
    )


class RuledRetinaNet(retinanet.RetinaNet):  # type: ignore[misc]
    """torchvision's RetinaNet with another rule for its detections, `rule`."""

    rule = "detectron2"

    def postprocess_detections(
        self, head_outputs: Mapping[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[Size]
    ) -> list[dict[str, Tensor]]:
        """Return boxes, scores and labels of each image."""
        return _dense_detections(self, self.rule, self.box_coder.decode_single, head_outputs, anchors, image_shapes)


class RuledFCOS(fcos.FCOS):  # type: ignore[misc]
    """torchvision's FCOS with another rule for its detections, `rule`."""

    rule = "detectron2"

    def postprocess_detections(
        self, head_outputs: Mapping[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[Size]
    ) -> list[dict[str, Tensor]]:
        """Return boxes, scores and labels of each image."""
        return _dense_detections(self, self.rule, self.box_coder.decode, head_outputs, anchors, image_shapes)


def _dense_detections(
    net: Any,
    rule: str,
    decode: Any,
    outputs: Mapping[str, list[Tensor]],
    anchors: Sequence[Sequence[Tensor]],
    sizes: Sequence[Size],
) -> list[dict[str, Tensor]]:
    """Detections of a dense head. Column 0 of the class logits, torchvision's background, is not used.

    Args:
        net: has torchvision's thresholds.
        rule: a name in `RULES`.
        decode: deltas (N, 4), anchors (N, 4) -> boxes (N, 4).
        outputs: torchvision's name -> output of each level, (B, N, columns).
        anchors: anchors of each image and level.
        sizes: (height, width) of the resized images, without padding.
    """
    images = []
    for index, size in enumerate(sizes):
        levels = []
        for level, places in enumerate(anchors[index]):
            ranks = torch.sigmoid(outputs["cls_logits"][level][index][:, 1:])
            centerness = None
            if "bbox_ctrness" in outputs:
                centerness = torch.sigmoid(outputs["bbox_ctrness"][level][index])
                if rule == "detectron2":
                    ranks = torch.sqrt(ranks * centerness)
            rows, columns = (ranks > net.score_thresh).nonzero(as_tuple=True)
            scores = ranks[rows, columns]
            # A traced file needs the number of candidates as a tensor, which torchvision's helper gives.
            scores, best = scores.topk(det_utils._topk_min(scores, net.topk_candidates, 0))
            rows, columns = rows[best], columns[best]
            boxes = decode(outputs["bbox_regression"][level][index][rows], places[rows])
            if centerness is not None and rule != "detectron2":
                scores = scores * centerness[rows, 0]
            if rule != "detectron2":
                boxes = box_ops.clip_boxes_to_image(boxes, size)
            if rule == "mmdetection":
                kept = _has_area(boxes)
                boxes, scores, columns = boxes[kept], scores[kept], columns[kept]
            levels.append((boxes, scores, columns + 1))
        boxes, scores, labels = (torch.cat(part) for part in zip(*levels, strict=True))
        kept = batched_nms(boxes, scores, labels, net.nms_thresh)[: net.detections_per_img]
        boxes = box_ops.clip_boxes_to_image(boxes[kept], size)
        images.append({"boxes": boxes, "scores": scores[kept], "labels": labels[kept]})
    return images


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def paste_sampled(cells: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Sample mask probabilities (N, 1, M, M) at the pixel centers of an image (Detectron2, MMDetection).

    ::

        u = (x + 0.5 - x1) / (x2 - x1) * 2 - 1,     v likewise;     mask = bilinear(cells, u, v) >= 0.5

    Outside of the cells the probability is 0, so that only pixels in the box or beside it can be in the mask.

    Returns:
        Masks (N, H, W) bool.

    Raises:
        DistillError: the numbers of masks and boxes differ.
    """
    if len(cells) != len(boxes):
        raise DistillError(f"paste_sampled: expected as many masks as boxes, got {len(cells)} and {len(boxes)}")
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        left, top = (int(torch.floor(low).clamp(min=1)) - 1 for low in (x1, y1))
        right, bottom = (int((torch.ceil(high) + 1).clamp(max=side)) for high, side in ((x2, width), (y2, height)))
        if not (right > left and bottom > top and x2 > x1 and y2 > y1):
            continue
        columns, rows = (
            torch.arange(low, high, device=boxes.device, dtype=torch.float32) + 0.5
            for low, high in ((left, right), (top, bottom))
        )
        u, v = (columns - x1) / (x2 - x1) * 2 - 1, (rows - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)[None]
        values = F.grid_sample(cells[index : index + 1].float(), grid, align_corners=False)
        masks[index, top:bottom, left:right] = values[0, 0] >= 0.5
    return masks
