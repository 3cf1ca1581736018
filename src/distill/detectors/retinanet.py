"""RetinaNet with a backbone and a feature pyramid: torchvision's model and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights, retinanet
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.ops import box_iou

from distill.detectors.anchors import anchor_generator, choose, set_box_coders
from distill.detectors.detection_rules import RuledRetinaNet, check_rule
from distill.detectors.distribution import (
    OVERLAP_LOSSES,
    DistanceCoder,
    DistributionLayer,
    check_box_head,
    distribution_focal,
    expected_distances,
)
from distill.detectors.options import BACKBONE, PIXELS, AnchorOptions, BackboneOptions, PixelOptions
from distill.detectors.pyramid import DenseDetector
from distill.detectors.towers import run_layers, split_tower
from distill.detectors.view import PyramidView, geometry, network, temporarily
from distill.precision import upcast
from distill.types import AnchorTargets, Detections, DistillError, Pyramid

ANCHORS = AnchorOptions(sizes=((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812)))
"""torchvision's anchors: three sizes for each of the strides 8, 16, 32, 64 and 128."""


class RetinaNetView(PyramidView):
    """The View of a RetinaNet. The class branch and the box branch run separately, each only if its output is read."""

    outputs = PyramidView.outputs | {"class_logits", "tower_features", "finish_tower"}

    @property
    def generator(self) -> Any:
        """torchvision's AnchorGenerator."""
        return self.net.anchor_generator

    @property
    def pool(self) -> Any:
        """RoIAlign over P3 to P7."""
        return self.detector.pool

    @network
    def _logits(self) -> Pyramid:
        """Stride -> (B, A*(K+1), H, W). The first logit of each anchor is no class: torchvision's labels begin at 1."""
        branch = self.net.head.classification_head
        return {stride: upcast(branch.cls_logits(branch.conv(x))) for stride, x in self.neck.items()}

    @geometry
    def class_logits(self) -> Pyramid:
        """Stride -> (B, A*K, H, W). Channel a*K + i belongs to anchor a and class i, which has label i + 1."""
        outputs = len(self.spec.classes) + 1
        return {stride: _classes_only(x, outputs) for stride, x in self._logits.items()}

    @network
    def deltas(self) -> Pyramid:
        """Stride -> box deltas (B, A*4, H, W)."""
        branch = self.net.head.regression_head
        return {stride: upcast(branch.bbox_reg(branch.conv(x))) for stride, x in self.neck.items()}

    def tower_features(self, branch: str, depth: int) -> Pyramid:
        """Return the output of convolution number `depth` of a branch, after its normalization and before its ReLU.

        The layers run again, apart from those of `class_logits` and `deltas`, whose ReLUs overwrite their input.

        Args:
            branch: ``classes`` or ``boxes``.
            depth: from 0, the neck, to the number of convolutions.
        """
        layers, _ = split_tower(self._branch(branch).conv, depth)
        with self.scope(autocast=True):
            return {stride: run_layers(layers, x) for stride, x in self.neck.items()}

    def finish_tower(self, branch: str, depth: int, features: Mapping[int, Tensor]) -> Pyramid:
        """Run the rest of a branch behind the ReLU of convolution number `depth`, on any features.

        The gradient reaches the features, also where this View is frozen.

        Args:
            branch: ``classes``, for logits as in `class_logits`, or ``boxes``, for deltas as in `deltas`.
            depth: number of convolutions that `features` have passed.
            features: stride -> (B, C, H, W).
        """
        _, layers = split_tower(self._branch(branch).conv, depth)
        dtype = next(self.net.head.parameters()).dtype
        enabled, autocast = self._autocast
        with torch.enable_grad(), torch.autocast(self.device.type, dtype=autocast, enabled=enabled):
            # With autocast, inputs of any type fit; without it, those of the type of the weights.
            maps = {stride: run_layers(layers, x if enabled else x.to(dtype)) for stride, x in features.items()}
            outputs = {stride: self._last_layer(branch, x, stride) for stride, x in maps.items()}
        if branch == "boxes":
            return outputs
        return {stride: _classes_only(x, len(self.spec.classes) + 1) for stride, x in outputs.items()}

    def _branch(self, branch: str) -> Any:
        head = self.net.head
        return {"classes": head.classification_head, "boxes": head.regression_head}[branch]

    def _last_layer(self, branch: str, x: Tensor, stride: int) -> Tensor:
        head = self._branch(branch)
        return upcast((head.cls_logits if branch == "classes" else head.bbox_reg)(x))

    def _flat(self) -> dict[str, list[Tensor]]:
        """torchvision's name -> logits (B, HWA, K+1) or deltas (B, HWA, 4) of each level."""
        return {
            "cls_logits": [flatten(x, len(self.spec.classes) + 1) for x in self._logits.values()],
            "bbox_regression": [flatten(x, 4) for x in self.deltas.values()],
        }

    @property
    def _image_anchors(self) -> list[Tensor]:
        return [torch.cat(list(self.anchors.values()))] * len(self.batch)

    @geometry
    def anchor_targets(self) -> AnchorTargets:
        """Targets of all anchors. All anchors except the ignored ones are sampled."""
        labels, deltas = [], []
        for target, match, anchors in zip(self.targets, self._matches, self._image_anchors, strict=True):
            # The added row of zeros is the box of unmatched anchors, also in an image without boxes.
            boxes, names = F.pad(target["boxes"], (0, 0, 0, 1)), F.pad(target["labels"], (0, 1))
            labels.append(torch.where(match >= 0, names[match.clamp(min=-1)], 1 + match.clamp(max=-1)))
            deltas.append(self._encode(boxes[match.clamp(min=-1)], anchors))
        stacked = torch.stack(labels)
        return AnchorTargets(stacked, torch.stack(deltas), stacked >= 0)

    @geometry
    def _matches(self) -> list[Tensor]:
        """torchvision's matches: index of each anchor's box (N,) in each image; -1 is background, -2 is ignored."""
        matches, matcher = [], self.net.proposal_matcher
        for target, anchors in zip(self.targets, self._image_anchors, strict=True):
            boxes = target["boxes"]
            nothing = torch.full((len(anchors),), -1, device=self.device)
            matches.append(matcher(box_iou(boxes, anchors)) if len(boxes) else nothing)
        return matches

    def _encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (N, 4) that move the anchors to the boxes."""
        return cast(Tensor, self.net.box_coder.encode_single(boxes, anchors))

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return cast(Tensor, self.net.box_coder.decode_single(deltas, anchors))

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """The losses ``classification`` and ``bbox_regression``."""
        outputs = {name: torch.cat(levels, dim=1) for name, levels in self._flat().items()}
        return {**self.net.compute_loss(self.targets, outputs, self._image_anchors), **self._further_losses()}

    def _further_losses(self) -> dict[str, Tensor]:
        """Losses that torchvision does not have."""
        return {}

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Return the detections in pixels of the resized image. A threshold of None is the detector's own."""
        anchors = [list(self.anchors.values())] * len(self.batch)
        thresholds = {"score_thresh": score, "nms_thresh": nms, "detections_per_img": top}
        with self.scope(autocast=False), temporarily(self.net, **thresholds):
            outputs = self._flat()
            if (score, nms, top) != (None, None, None):
                # With the detector's own thresholds the result stays torchvision's, where label 0 takes part in NMS.
                outputs["cls_logits"] = list(map(_without_first, outputs["cls_logits"]))
            images = self.net.postprocess_detections(outputs, anchors, self.sizes)
        return [_without_background(Detections(image["boxes"], image["scores"], image["labels"])) for image in images]


class DistributionView(RetinaNetView):
    """The View of a RetinaNet whose box head predicts a distribution for each side."""

    outputs = RetinaNetView.outputs | {"side_logits"}

    @network
    def side_logits(self) -> Pyramid:
        """Stride -> (B, A*4*bins, H, W): logits of the distances of each side, see `DistributionLayer`."""
        branch = self.net.head.regression_head
        return {stride: upcast(branch.bbox_reg.logits(branch.conv(x))) for stride, x in self.neck.items()}

    @geometry
    def deltas(self) -> Pyramid:
        """Stride -> expected distances (B, A*4, H, W) to the left, top, right and bottom side, in units."""
        bins = self.detector.options["box_bins"]
        return {stride: expected_distances(x, bins) for stride, x in self.side_logits.items()}

    def _further_losses(self) -> dict[str, Tensor]:
        return {"bbox_distribution": self._distribution_loss(by_image=True)}

    def _distribution_loss(self, by_image: bool) -> Tensor:
        """Weight times the mean distribution focal loss of the sides of positive anchors.

        Args:
            by_image: whether the mean is that of each image's own mean, as in RetinaNet's box loss, or that of all
                positive anchors of the batch, as in FCOS.
        """
        bins, targets = self.detector.options["box_bins"], self.anchor_targets
        logits = torch.cat([flatten(x, 4 * bins) for x in self.side_logits.values()], dim=1)
        image, rows = (targets.labels > 0).nonzero(as_tuple=True)
        positive = logits[image, rows].view(-1, 4, bins)
        error = distribution_focal(positive, targets.deltas[image, rows]).mean(1)
        counts = (targets.labels > 0).sum(1).clamp(min=1)
        share = error / (counts[image] * len(self.batch)) if by_image else error / max(1, len(error))
        return cast(float, self.detector.options["distribution_weight"]) * share.sum()


def flatten(x: Tensor, columns: int) -> Tensor:
    """Reshape (B, A*columns, H, W) to (B, H*W*A, columns), in torchvision's order."""
    batch, channels, height, width = x.shape
    flat: Tensor = permute_and_flatten(x, batch, channels // columns, columns, height, width)
    return flat


def _classes_only(x: Tensor, outputs: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels // outputs, outputs, height, width)[:, :, 1:].flatten(1, 2)


def _without_first(logits: Tensor) -> Tensor:
    """Logits (B, N, K+1) whose first column is -inf, so that label 0 is never detected."""
    return torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits[..., 1:]], dim=-1)


def _without_background(detections: Detections) -> Detections:
    keep = detections.labels > 0
    return Detections(detections.boxes[keep], detections.scores[keep], detections.labels[keep])


class RetinaNet(DenseDetector):
    """RetinaNet with a backbone and a feature pyramid of strides 8 to 128 (Lin et al. 2017).

    The defaults are torchvision's version 1. ``p6_from="c5", head_norm="group", box_loss="giou"`` is version 2.
    Arguments that are not listed here are those of `FasterRCNN` or of torchvision.

    Args:
        classes: class names in label order, without background. None means the classes of `weights`.
        anchors: anchors of the strides 8, 16, 32, 64 and 128, see `options.AnchorOptions`.
        p6_from: the input of the convolution that computes P6 (stride 64): ``p5``, ``c5`` (paper, Detectron2), or
            ``lateral``, the lateral map of C5 (an option of MMDetection).
        p7_relu: whether a ReLU stands between P6 and the convolution that computes P7 (stride 128). MMDetection has
            none.
        anchor_delta_weights: factors on the deltas, see `anchors.set_box_coders`.
        head_norm: normalization in the heads: ``none`` or ``group`` (32 groups). ``group_bias`` also gives the
            convolutions before the norms a bias (Detectron2).
        box_loss: ``l1``, ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
        box_head: ``regression`` (four deltas per anchor), or ``distribution``: a distribution over the distances to
            each side, whose expectation gives the box (Li et al., "Generalized Focal Loss", NeurIPS 2020). Its losses
            have a further one, ``bbox_distribution``. The unit of the distances, an eighth of the anchor's side, is
            our choice. `delta_clamp` and `anchor_delta_weights` have no effect, and `box_loss` is giou, diou or ciou.
        box_bins: number of distances of a distribution: 0, 1, ..., box_bins - 1 units.
        distribution_weight: weight of the distribution focal loss in ``bbox_distribution``.

    Raises:
        DistillError: an option has an invalid value, or the weights do not fit.
    """

    family = "retinanet"
    enum = RetinaNet_ResNet50_FPN_Weights
    class_layers: Mapping[str, int] = {"head.classification_head.cls_logits": 1}
    view_class = RetinaNetView
    passed_on = ("fg_iou", "bg_iou", "topk", "score_thresh", "nms_thresh", "detections_per_img", "min_size", "max_size")
    anchor_defaults = ANCHORS

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        input_stride: int = 1,
        neck_channels: int = 256,
        p6_from: str = "p5",
        p7_relu: bool = True,
        anchors: AnchorOptions | Mapping[str, Any] = ANCHORS,
        delta_clamp: str = "upper",
        anchor_delta_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        head_norm: str = "none",
        box_loss: str = "l1",
        box_head: str = "regression",
        box_bins: int = 17,
        distribution_weight: float = 0.25,
        topk_candidates: int = 1000,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 300,
        detection_rule: str = "torchvision",
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 800,
        max_size: int = 1333,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        if check_box_head(box_head, box_bins, distribution_weight) and box_loss not in OVERLAP_LOSSES:
            raise DistillError(
                f"box_loss: with box_head=distribution, expected {', '.join(OVERLAP_LOSSES)}, got {box_loss!r}. Add "
                "box_loss=giou (model.box_loss, teacher.model.box_loss)"
            )
        super().__init__(locals())

    def build_network(self, body: Any, classes: int, options: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """Build torchvision's RetinaNet."""
        generator = anchor_generator(strides=self.strides, **options["anchors"])
        per_cell = generator.num_anchors_per_location()[0]
        ruled = check_rule(options["detection_rule"]) != "torchvision"
        net = (RuledRetinaNet if ruled else retinanet.RetinaNet)(
            self.backbone(body, options),
            classes + 1,
            anchor_generator=generator,
            head=_head(options["neck_channels"], per_cell, classes + 1, options["head_norm"], options["box_loss"]),
            **shared,
        )
        coders, weights = (net, net.head.regression_head), options["anchor_delta_weights"]
        set_box_coders(coders, options["delta_clamp"], weights, "anchor_delta_weights")
        if options["box_head"] == "distribution":
            self.view_class = DistributionView
            net.head.regression_head.bbox_reg = DistributionLayer(
                options["neck_channels"], per_cell, options["box_bins"]
            )
            for part in coders:
                part.box_coder = DistanceCoder()
        if ruled:
            net.rule = options["detection_rule"]
        return net


def _head(channels: int, anchors: int, outputs: int, norm: str, box_loss: str) -> Any:
    if norm not in ("none", "group", "group_bias") or (norm != "none" and channels % 32):
        raise DistillError(
            "head_norm: expected none, or group or group_bias with neck_channels a multiple of 32, got "
            f"{norm!r} with {channels}"
        )
    choose("box_loss", box_loss, ("l1", "smooth_l1", "giou", "diou", "ciou"))
    layer = None if norm == "none" else partial(nn.GroupNorm, 32)
    head = retinanet.RetinaNetHead(channels, anchors, outputs, norm_layer=layer)
    for tower in (head.classification_head.conv, head.regression_head.conv):
        for part in tower if norm == "group_bias" else ():
            part[0].bias = nn.Parameter(torch.zeros(channels))
    head.regression_head._loss_type = box_loss
    return head
