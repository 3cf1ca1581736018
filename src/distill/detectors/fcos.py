"""FCOS on a backbone with FPN: torchvision's own model, and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos

from distill.detectors.anchors import anchor_generator, order_channels, p6_p7
from distill.detectors.backbones import build_backbone, freeze, resolved_options, with_fpn
from distill.detectors.base import Detector, arguments
from distill.detectors.retinanet import STRIDES, OneStageView, flatten
from distill.detectors.roi_align import region_pool
from distill.detectors.view import geometry, network
from distill.detectors.weights import class_names, initialise
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Pyramid

PASSED_ON = (
    "center_sampling_radius",
    "topk_candidates",
    "score_thresh",
    "nms_thresh",
    "detections_per_img",
    "min_size",
    "max_size",
)
"""The arguments that torchvision's constructor takes under the same names."""


class AnchorFreeView(OneStageView):
    """An FCOS looking at a batch. Boxes and centerness share a trunk, which runs once; their last layers run apart.

    Its anchors are points: one square a cell, a nominal stride wide, around the place that distances are measured from.
    """

    outputs = OneStageView.outputs | {"points", "centerness"}

    @geometry
    def points(self) -> dict[int, Tensor]:
        """Stride -> (H*W, 2) float32: x and y that the distances of `deltas` are measured from."""
        return {stride: (boxes[:, :2] + boxes[:, 2:]) / 2 for stride, boxes in self.anchors.items()}

    @network
    def _trunk(self) -> Pyramid:
        """(B, C, H, W): what the box layer and the centerness layer both read."""
        return {stride: self.net.head.regression_head.conv(x) for stride, x in self.neck.items()}

    @network
    def deltas(self) -> Pyramid:
        """Stride -> (B, 4, H, W): distances to left, top, right and bottom in strides, after the ReLU, so from 0 on."""
        layer = self.net.head.regression_head.bbox_reg
        return {stride: upcast(torch.relu(layer(x))) for stride, x in self._trunk.items()}

    @network
    def centerness(self) -> Pyramid:
        """Stride -> logits (B, 1, H, W)."""
        layer = self.net.head.regression_head.bbox_ctrness
        return {stride: upcast(layer(x)) for stride, x in self._trunk.items()}

    def _flat(self) -> dict[str, list[Tensor]]:
        """Logits (B, HW, K+1), distances (B, HW, 4) and centerness (B, HW, 1) of each level, by torchvision's names."""
        return {**super()._flat(), "bbox_ctrness": [flatten(x, 1) for x in self.centerness.values()]}

    @geometry
    def _matches(self) -> list[Tensor]:
        """torchvision matches inside its loss: its rule is run for a stand-in that keeps what the heads would be handed."""
        kept: list[list[Tensor]] = []
        head = SimpleNamespace(compute_loss=lambda *handed: kept.append(handed[3]))
        itself = SimpleNamespace(head=head, center_sampling_radius=self.net.center_sampling_radius)
        counts = [len(level) for level in self.anchors.values()]
        fcos.FCOS.compute_loss(itself, self.targets, {}, self._image_anchors, counts)
        return kept[0]

    def _encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Distances (N, 4) to the sides of the boxes, in strides."""
        return cast(Tensor, self.net.box_coder.encode(anchors[None], boxes[None])[0])

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return cast(Tensor, self.net.box_coder.decode(deltas, anchors))

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """classification, bbox_regression and bbox_ctrness."""
        outputs = {name: torch.cat(levels, dim=1) for name, levels in self._flat().items()}
        counts = [len(level) for level in self.anchors.values()]
        return dict(self.net.compute_loss(self.targets, outputs, self._image_anchors, counts))


class FCOS(Detector):
    """FCOS with a backbone and a feature pyramid of strides 8 to 128 (Tian et al. 2019), as torchvision has it.

    It differs from the paper: a cell's point is its corner and not its middle, distances pass a ReLU and not an
    exponential with a scale a level, the score is the root of class times centerness, and the sums of all three losses
    are divided by the positive cells of the own process. Arguments that are not listed here are those of
    `two_stage.FasterRCNN` or torchvision's.

    Args:
        classes: names in label order, background left out; None takes those of `weights`.
        neck_channels: a multiple of 32 from 64 on, for the heads have group norm with 32 groups.
        p6_from, p7_relu: as of `one_stage.RetinaNet`.
        center_sampling_radius: how far from a box's centre a positive cell may lie, in strides.
    """

    family = "fcos"
    enum = FCOS_ResNet50_FPN_Weights
    coco_eps = 1e-5
    class_layers: ClassVar[Mapping[str, int]] = {"head.classification_head.cls_logits": 1}
    view_class = AnchorFreeView

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet",
        depth: int | None = None,
        width: float = 1.0,
        norm: str = "batch",
        norm_eps: float | None = None,
        stride_in_1x1: bool = False,
        trainable_stages: int = 5,
        neck_channels: int = 256,
        p6_from: str = "p5",
        p7_relu: bool = True,
        center_sampling_radius: float = 1.5,
        topk_candidates: int = 1000,
        score_thresh: float = 0.2,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
        channel_order: str = "rgb",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        min_size: int = 800,
        max_size: int = 1333,
        backbone_weights: str | None = None,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        options = arguments(locals())
        if neck_channels % 32 or neck_channels < 64:  # one channel a group has no statistics on a map of one cell
            raise DistillError(f"neck_channels: FCOS's group norm expects 64, 96, 128 or so on, got {neck_channels}")
        if not center_sampling_radius > 0:
            raise DistillError(f"center_sampling_radius: expected strides, above 0, got {center_sampling_radius}")
        names = class_names(classes, weights, self.enum)
        body = build_backbone(backbone, depth, width, norm, norm_eps, stride_in_1x1)
        options |= resolved_options(body)
        net = fcos.FCOS(
            with_fpn(body, 2, neck_channels, p6_p7(body.channels[-1], neck_channels, p6_from, p7_relu)),
            len(names) + 1,
            anchor_generator=anchor_generator([(stride,) for stride in STRIDES], (1.0,), STRIDES),
            image_mean=list(mean),
            image_std=list(std),
            **{name: options[name] for name in PASSED_ON},
        )
        spec = DetectorSpec(
            family=self.family,
            outputs=self.view_class.outputs,
            classes=names,
            body=dict(zip((4, 8, 16, 32), body.channels, strict=True)),
            neck=dict.fromkeys(STRIDES, neck_channels),
            anchors=dict.fromkeys(STRIDES, 1),
            mean=tuple(mean),
            std=tuple(std),
            norm=norm,
        )
        order_channels(net, channel_order)
        super().__init__(net, spec, options, freeze(net.backbone.body, trainable_stages))
        self.pool = region_pool(STRIDES, 7, 2)
        """RoIAlign over P3..P7, for losses that look at regions; FCOS itself has none."""
        initialise(self, backbone_weights, weights, head)
