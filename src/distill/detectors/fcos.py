"""FCOS with a backbone and a feature pyramid: torchvision's model and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos

from distill.detectors.anchors import anchor_generator, choose
from distill.detectors.detection_rules import RuledFCOS, check_rule
from distill.detectors.distribution import DistributionLayer, check_box_head, expected_distances
from distill.detectors.options import BACKBONE, PIXELS, BackboneOptions, PixelOptions
from distill.detectors.pyramid import DenseDetector
from distill.detectors.retinanet import DistributionView, RetinaNetView, flatten
from distill.detectors.view import geometry, network
from distill.precision import upcast
from distill.types import DistillError, Pyramid


class FCOSView(RetinaNetView):
    """The View of an FCOS.

    The box branch and the centerness branch share their convolutions, which run once. Their last layers run separately.
    Each cell has one anchor: a square whose side is the nominal stride. Its center is the origin of the distances.
    """

    outputs = RetinaNetView.outputs | {"points", "centerness"}

    @geometry
    def points(self) -> dict[int, Tensor]:
        """Stride -> (H*W, 2) float32: the origins (x, y) of the distances in `deltas`."""
        return {stride: (boxes[:, :2] + boxes[:, 2:]) / 2 for stride, boxes in self.anchors.items()}

    @network
    def _class_features(self) -> Pyramid:
        """Stride -> (B, C, H, W): the input of the class layer."""
        return {stride: self.net.head.classification_head.conv(x) for stride, x in self.neck.items()}

    @network
    def _logits(self) -> Pyramid:
        layer = self.net.head.classification_head.cls_logits
        if self.detector.options["centerness_from"] == "class":  # two layers read the features: compute them once
            return {stride: upcast(layer(x)) for stride, x in self._class_features.items()}
        tower = self.net.head.classification_head.conv
        return {stride: upcast(layer(tower(x))) for stride, x in self.neck.items()}

    @network
    def _box_features(self) -> Pyramid:
        """Stride -> (B, C, H, W): the input of both the box layer and the centerness layer."""
        return {stride: self.net.head.regression_head.conv(x) for stride, x in self.neck.items()}

    @network
    def deltas(self) -> Pyramid:
        """Stride -> (B, 4, H, W): distances to the left, top, right and bottom side, in strides, not negative."""
        head = self.net.head
        layer, distances = head.regression_head.bbox_reg, getattr(head, "distances", None)
        if distances is None:  # torchvision's head
            return {stride: upcast(torch.relu(layer(x))) for stride, x in self._box_features.items()}
        return {
            stride: distances(upcast(layer(x)), level) for level, (stride, x) in enumerate(self._box_features.items())
        }

    def _last_layer(self, branch: str, x: Tensor, stride: int) -> Tensor:
        outputs, distances = super()._last_layer(branch, x, stride), getattr(self.net.head, "distances", None)
        if branch == "classes":
            return outputs
        return outputs.relu() if distances is None else cast(Tensor, distances(outputs, list(self.neck).index(stride)))

    @network
    def centerness(self) -> Pyramid:
        """Stride -> centerness logits (B, 1, H, W)."""
        layer = self.net.head.regression_head.bbox_ctrness
        from_class = self.detector.options["centerness_from"] == "class"
        features = self._class_features if from_class else self._box_features
        return {stride: upcast(layer(x)) for stride, x in features.items()}

    def _flat(self) -> dict[str, list[Tensor]]:
        """torchvision's name -> logits (B, HW, K+1), distances (B, HW, 4) or centerness (B, HW, 1) of each level."""
        return {**super()._flat(), "bbox_ctrness": [flatten(x, 1) for x in self.centerness.values()]}

    @geometry
    def _matches(self) -> list[Tensor]:
        """Index of each cell's box (N,) in each image; -1 is background.

        torchvision computes the matches inside its loss. This method calls that loss with a substitute for the head,
        which stores the matches.
        """
        matches: list[list[Tensor]] = []
        head = SimpleNamespace(compute_loss=lambda *arguments: matches.append(arguments[3]))
        substitute = SimpleNamespace(head=head, center_sampling_radius=self.net.center_sampling_radius)
        counts = [level.shape[0] for level in self.anchors.values()]
        fcos.FCOS.compute_loss(substitute, self.targets, {}, self._image_anchors, counts)
        return matches[0]

    def _encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Distances (N, 4) from the centers of the anchors to the sides of the boxes, in strides."""
        return cast(Tensor, self.net.box_coder.encode(anchors[None], boxes[None])[0])

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return cast(Tensor, self.net.box_coder.decode(deltas, anchors))

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """The losses ``classification``, ``bbox_regression`` and ``bbox_ctrness``."""
        outputs = {name: torch.cat(levels, dim=1) for name, levels in self._flat().items()}
        counts = [level.shape[0] for level in self.anchors.values()]
        losses = self.net.compute_loss(self.targets, outputs, self._image_anchors, counts)
        return {**losses, **self._further_losses()}


class FCOSDistributionView(FCOSView, DistributionView):
    """The View of an FCOS whose box head predicts a distribution for each side, in strides."""

    outputs = FCOSView.outputs | DistributionView.outputs

    @network
    def side_logits(self) -> Pyramid:
        """Stride -> (B, 4*bins, H, W): logits of the distances of each side, see `DistributionLayer`."""
        layer = self.net.head.regression_head.bbox_reg
        return {stride: upcast(layer.logits(x)) for stride, x in self._box_features.items()}

    @geometry
    def deltas(self) -> Pyramid:
        """Stride -> expected distances (B, 4, H, W) to the left, top, right and bottom side, in strides."""
        bins = self.detector.options["box_bins"]
        return {stride: expected_distances(x, bins) for stride, x in self.side_logits.items()}

    def _further_losses(self) -> dict[str, Tensor]:
        return {"bbox_distribution": self._distribution_loss(by_image=False)}


class FCOSHead(fcos.FCOSHead):  # type: ignore[misc]
    """torchvision's head of an FCOS with the options of `FCOS` that torchvision does not have."""

    def __init__(self, channels: int, outputs: int, strides: Sequence[int], options: Mapping[str, Any]) -> None:
        super().__init__(channels, 1, outputs)
        if options["head_norm"] == "none":
            self.classification_head = fcos.FCOSClassificationHead(channels, 1, outputs, norm_layer=nn.Identity)
            self.regression_head = fcos.FCOSRegressionHead(channels, 1, norm_layer=nn.Identity)
        if options["level_scales"]:
            self.regression_head.scales = nn.Parameter(torch.ones(len(strides)))
        self.strides, self.exponential = tuple(strides), options["distances"] == "exp"
        self.centerness_from = options["centerness_from"]

    def distances(self, values: Tensor, level: int) -> Tensor:
        """Outputs of the box layer (B, 4, H, W) at a level -> distances in strides."""
        scales = getattr(self.regression_head, "scales", None)
        scaled = values if scales is None else values * scales[level].to(values.dtype)
        return torch.exp(scaled) / self.strides[level] if self.exponential else torch.relu(scaled)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Compute torchvision's outputs, (B, N, columns) over all levels."""
        levels: dict[str, list[Tensor]] = {"cls_logits": [], "bbox_regression": [], "bbox_ctrness": []}
        classes, boxes = self.classification_head, self.regression_head
        for level, features in enumerate(x):
            class_features, box_features = classes.conv(features), boxes.conv(features)
            centered = class_features if self.centerness_from == "class" else box_features
            levels["cls_logits"].append(flatten(classes.cls_logits(class_features), classes.num_classes))
            levels["bbox_regression"].append(flatten(self.distances(boxes.bbox_reg(box_features), level), 4))
            levels["bbox_ctrness"].append(flatten(boxes.bbox_ctrness(centered), 1))
        return {name: torch.cat(parts, dim=1) for name, parts in levels.items()}


class FCOS(DenseDetector):
    """torchvision's FCOS with a backbone and a feature pyramid of strides 8 to 128 (Tian et al. 2019).

    With the default options it differs from the paper in four points:

    - The point of a cell is its corner. In the paper it is the middle.
    - Distances pass a ReLU. In the paper they pass an exponential, with a scale for each level.
    - The score is the square root of class probability times centerness.
    - The sums of all three losses are divided by the number of positive cells in the own process.

    Arguments that are not listed here are those of `FasterRCNN` or of torchvision.

    Args:
        classes: class names in label order, without background. None means the classes of `weights`.
        neck_channels: with ``head_norm=group`` a multiple of 32, at least 64: the norm has 32 groups.
        p6_from: see `RetinaNet`.
        p7_relu: see `RetinaNet`.
        point_offset: the position of a cell's point, in steps from the cell's corner: 0 is the corner (torchvision),
            0.5 the middle (paper, Detectron2, MMDetection).
        point_step: the distance between neighboring points, see `anchors.anchor_generator`.
        head_norm: normalization in the towers: ``group`` (32 groups) or ``none``.
        centerness_from: the tower that the centerness layer reads: ``box``, or ``class`` (paper).
        distances: the function from outputs to distances: ``relu``, in strides, or ``exp``, in pixels (paper).
        level_scales: whether the outputs of the box layer have a trained factor for each level (paper).
        box_head: ``regression``, or ``distribution``, see `RetinaNet`; the unit of its distances is a stride. It has
            neither ``distances=exp`` nor `level_scales`.
        box_bins, distribution_weight: see `RetinaNet`.
        detection_rule: see `FasterRCNN`.
        center_sampling_radius: the largest distance of a positive cell from the center of its box, in strides.

    Raises:
        DistillError: an option has an invalid value.
    """

    family = "fcos"
    enum = FCOS_ResNet50_FPN_Weights
    coco_eps = 1e-5
    class_layers: Mapping[str, int] = {"head.classification_head.cls_logits": 1}
    view_class = FCOSView
    passed_on = (
        "center_sampling_radius",
        "topk_candidates",
        "score_thresh",
        "nms_thresh",
        "detections_per_img",
        "min_size",
        "max_size",
    )

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        input_stride: int = 1,
        neck_channels: int = 256,
        p6_from: str = "p5",
        p7_relu: bool = True,
        point_offset: float = 0.0,
        point_step: str = "fitted",
        head_norm: str = "group",
        centerness_from: str = "box",
        distances: str = "relu",
        level_scales: bool = False,
        box_head: str = "regression",
        box_bins: int = 17,
        distribution_weight: float = 0.25,
        center_sampling_radius: float = 1.5,
        topk_candidates: int = 1000,
        score_thresh: float = 0.2,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
        detection_rule: str = "torchvision",
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 800,
        max_size: int = 1333,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        if not 0 <= point_offset <= 1:
            raise DistillError(
                f"point_offset: expected 0 (a cell's corner) to 1; 0.5 is its middle, got {point_offset!r}"
            )
        choose("point_step", point_step, ("fitted", "nominal"))
        choose("head_norm", head_norm, ("group", "none"))
        choose("centerness_from", centerness_from, ("box", "class"))
        choose("distances", distances, ("relu", "exp"))
        check_rule(detection_rule)
        if check_box_head(box_head, box_bins, distribution_weight) and (distances != "relu" or level_scales):
            raise DistillError(
                "box_head=distribution: expected distances=relu and level_scales=false, because a distribution has no "
                f"use for them, got distances={distances} and level_scales={str(level_scales).lower()}"
            )
        # With one channel per group, a map of one cell gives each group a single value: it has no statistics.
        if head_norm == "group" and (neck_channels % 32 or neck_channels < 64):
            raise DistillError(f"neck_channels: FCOS's group norm expects 64, 96, 128 or so on, got {neck_channels}")
        if not center_sampling_radius > 0:
            raise DistillError(f"center_sampling_radius: expected strides, above 0, got {center_sampling_radius}")
        super().__init__(locals())

    def build_network(self, body: Any, classes: int, options: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """Build torchvision's FCOS."""
        own = {name: options[name] for name in ("head_norm", "centerness_from", "distances", "level_scales")}
        backbone, head = self.backbone(body, options), None
        if own != {"head_norm": "group", "centerness_from": "box", "distances": "relu", "level_scales": False}:
            head = FCOSHead(options["neck_channels"], classes + 1, self.strides, own)
        sizes, places = [(stride,) for stride in self.strides], (options["point_offset"], options["point_step"])
        ruled = options["detection_rule"] != "torchvision"
        net = (RuledFCOS if ruled else fcos.FCOS)(
            backbone,
            classes + 1,
            anchor_generator=anchor_generator(sizes, (1.0,), self.strides, offset=places[0], step=places[1]),
            head=head,
            **shared,
        )
        if ruled:
            net.rule = options["detection_rule"]
        if options["box_head"] == "distribution":
            self.view_class = FCOSDistributionView
            layer = DistributionLayer(options["neck_channels"], 1, options["box_bins"])
            net.head.regression_head.bbox_reg = layer
        return net
