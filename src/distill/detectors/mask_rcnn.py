"""Mask R-CNN with a backbone and a feature pyramid: a Faster R-CNN with torchvision's mask head, and its View."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss, paste_masks_in_image

from distill.detectors.detection_rules import finish, paste_sampled
from distill.detectors.faster_rcnn import FasterRCNN, FasterRCNNView
from distill.detectors.view import geometry
from distill.precision import upcast
from distill.types import Detections, DistillError, Size

LAYERS = 4
"""Number of convolutions in the mask head, before the layer that doubles the resolution."""
POOLED = 14
"""Side of the pooled features that the mask head reads. A mask has twice this side."""


class MaskRCNNView(FasterRCNNView):
    """The View of a Mask R-CNN. Only `mask_logits`, `losses` and `detections` run the mask head."""

    outputs = FasterRCNNView.outputs | {"mask_logits"}

    @functools.cached_property
    def targets(self) -> list[dict[str, Tensor]]:
        """Ground truth in torchvision's format. If the batch has no masks, only `losses` fails."""
        rows = zip(super().targets, self.batch.targets, strict=True)
        return [{**truth, "masks": cast(Tensor, target.masks)} for truth, target in rows]

    def mask_logits(self, boxes: Sequence[Tensor]) -> Tensor:
        """Return mask logits (R, K+1, 28, 28) for one tensor of boxes (r, 4) per image, in order.

        The map of the background is never used.
        """
        return self.keep("mask_logits", boxes, self._mask_logits)

    def _mask_logits(self, boxes: Sequence[Tensor]) -> Tensor:
        heads = self.net.roi_heads
        features = self.pooled(heads.mask_roi_pool, boxes)
        with self.scope(autocast=True):
            return upcast(heads.mask_predictor(heads.mask_head(features)))

    @geometry
    def _mask_loss(self) -> Tensor:
        """Binary cross entropy of each foreground region's mask of its own class (He et al. 2017).

        The target is the ground-truth mask, cropped to the region and resized.
        """
        if any(target.masks is None for target in self.batch.targets):
            raise DistillError(
                "view.losses: a Mask R-CNN learns from instance masks, but the batch's targets have none; "
                "set data.masks=true"
            )
        boxes, matched, labels, _ = self._sample
        rows = [torch.where(image_labels > 0)[0] for image_labels in labels]
        regions = [image_boxes[row] for image_boxes, row in zip(boxes, rows, strict=True)]
        truth = [[target[name] for target in self.targets] for name in ("masks", "labels")]
        objects = [matches[row] for matches, row in zip(matched, rows, strict=True)]
        return cast(Tensor, maskrcnn_loss(self.mask_logits(regions), regions, *truth, objects))

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """The losses of a Faster R-CNN and ``loss_mask``, in torchvision's order."""
        classifier, box, objectness, rpn_box = super().losses.items()
        return dict([classifier, box, ("loss_mask", self._mask_loss), objectness, rpn_box])

    @geometry
    def detections(self) -> list[Detections]:
        """Detections after NMS, with masks, in pixels of the original images."""
        predictions = self.predictions()
        logits = self.mask_logits([image.boxes for image in predictions])
        cells = maskrcnn_inference(logits, [image.labels for image in predictions])
        rows = zip(self.enlarged(predictions), cells, self.batch.original_sizes, strict=True)
        into_image = paste if self.rule == "torchvision" else paste_sampled
        return [
            finish(image._replace(masks=into_image(masks, image.boxes, size)), self.rule) for image, masks, size in rows
        ]


def paste(cells: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Resize mask probabilities (N, 1, 28, 28) into their boxes (N, 4); return masks (N, H, W) bool of an image.

    torchvision's function is called for one mask at a time, because its float32 result for all masks takes four bytes
    per pixel and object.
    """
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    for index in range(len(boxes)):
        row = slice(index, index + 1)
        masks[index] = paste_masks_in_image(cells[row], boxes[row], size)[0, 0] > 0.5
    return masks


class MaskRCNN(FasterRCNN):
    """Mask R-CNN with a backbone and a feature pyramid of strides 4 to 64 (He et al. 2017).

    The arguments are those of `FasterRCNN`. The mask head is torchvision's: four convolutions, a layer that doubles the
    resolution, and one map per class. The mask head has as many channels as the neck, by default 256 as in torchvision.
    Its RoIAlign has the options of the box head. Training needs targets with masks: ``data.masks=true``.
    """

    family = "mask_rcnn"
    enum = MaskRCNN_ResNet50_FPN_Weights
    class_layers: Mapping[str, int] = {
        **FasterRCNN.class_layers,
        "roi_heads.mask_predictor.mask_fcn_logits": 1,
    }
    view_class = MaskRCNNView

    @staticmethod
    def extend(heads: Any, channels: int, classes: int, norm_layer: Callable[..., nn.Module] | None) -> None:
        """Add the mask head and its RoIAlign to `heads`, before any weights are loaded."""
        pool = copy.deepcopy(heads.box_roi_pool)
        pool.output_size = (POOLED, POOLED)
        heads.mask_roi_pool = pool
        heads.mask_head = MaskRCNNHeads(channels, [channels] * LAYERS, 1, norm_layer)
        heads.mask_predictor = MaskRCNNPredictor(channels, channels, classes + 1)
