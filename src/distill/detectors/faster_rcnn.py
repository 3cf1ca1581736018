"""Faster R-CNN on a backbone with FPN: torchvision's own model, and its View."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, faster_rcnn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from distill.detectors.anchors import anchor_generator, clamp_deltas
from distill.detectors.backbones import with_fpn
from distill.detectors.options import ANCHORS, BACKBONE, PIXELS, AnchorOptions, BackboneOptions, PixelOptions
from distill.detectors.pyramid import PyramidDetector
from distill.detectors.roi_align import region_pool
from distill.detectors.view import PyramidView, geometry, network, temporarily
from distill.precision import upcast
from distill.types import AnchorTargets, Detections, Pyramid, Regions


class TwoStageView(PyramidView):
    """A Faster R-CNN looking at a batch."""

    outputs = PyramidView.outputs | {"objectness", "proposals", "rois", "roi_logits", "roi_boxes"}

    @property
    def generator(self) -> Any:
        """torchvision's AnchorGenerator."""
        return self.net.rpn.anchor_generator

    @property
    def pool(self) -> Any:
        """RoIAlign over P2..P5."""
        return self.net.roi_heads.box_roi_pool

    @network
    def _dense(self) -> tuple[Pyramid, Pyramid]:
        scores, deltas = self.net.rpn.head(list(self.neck.values()))
        strides = self.spec.neck
        return dict(zip(strides, map(upcast, scores), strict=True)), dict(
            zip(strides, map(upcast, deltas), strict=True)
        )

    @property
    def objectness(self) -> Pyramid:
        """Stride -> RPN logits (B, A, H, W)."""
        return self._dense[0]

    @property
    def deltas(self) -> Pyramid:
        """Stride -> RPN deltas (B, A*4, H, W)."""
        return self._dense[1]

    @geometry
    def _flat(self) -> tuple[Tensor, Tensor]:
        """Objectness (B*HWA, 1) and deltas (B*HWA, 4) over all levels."""
        flat = concat_box_prediction_layers(list(self.objectness.values()), list(self.deltas.values()))
        return flat[0], flat[1]

    @geometry
    def _image_anchors(self) -> list[Tensor]:
        return [torch.cat(list(self.anchors.values()))] * len(self.batch)

    @geometry
    def proposals(self) -> list[Tensor]:
        """(P, 4) per image, clipped, after NMS, best first, detached."""
        rpn, (objectness, deltas) = self.net.rpn, self._flat
        boxes = rpn.box_coder.decode(deltas.detach(), self._image_anchors).view(len(self.batch), -1, 4)
        counts = [len(level) for level in self.anchors.values()]
        with temporarily(rpn, training=self.training):
            return list(rpn.filter_proposals(boxes, objectness, self.sizes, counts)[0])

    @geometry
    def _rpn_targets(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Labels and regression targets of all anchors, a tensor an image."""
        rpn, anchors = self.net.rpn, self._image_anchors
        labels, truth = rpn.assign_targets_to_anchors(anchors, self.targets)
        return labels, rpn.box_coder.encode(truth, anchors)

    @geometry
    def _rpn_sample(self) -> tuple[list[Tensor], list[Tensor]]:
        """Positive and negative anchors that the RPN learns from, an indicator (N,) an image each. Drawn once."""
        if self.seed is None:
            _ = self.body  # a body that drops paths by chance draws before it in torchvision
        with self.draw(0):
            positive, negative = self.net.rpn.fg_bg_sampler(self._rpn_targets[0])
        return positive, negative

    @geometry
    def _rpn_losses(self) -> tuple[Tensor, Tensor]:
        sample = self._rpn_sample
        with temporarily(self.net.rpn, fg_bg_sampler=lambda _: sample):
            objectness, box = self.net.rpn.compute_loss(*self._flat, *self._rpn_targets)
        return objectness, box

    @geometry
    def anchor_targets(self) -> AnchorTargets:
        """Label 1 for an object of any class."""
        sampled = [positive | negative for positive, negative in zip(*self._rpn_sample, strict=True)]
        labels, deltas = self._rpn_targets
        return AnchorTargets(torch.stack(labels).long(), torch.stack(list(deltas)), torch.stack(sampled) > 0)

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return cast(Tensor, self.net.rpn.box_coder.decode_single(deltas, anchors))

    @geometry
    def _sample(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, indices of the matched truth, labels and regression targets of the regions that the heads learn from."""
        if self.seed is None:
            _ = self._rpn_sample  # drawn first in torchvision; under a seed each draw has a stream of its own
        with self.draw(1):
            sample = self.net.roi_heads.select_training_samples(self.proposals, self.targets)
        return cast("tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]", sample)

    @geometry
    def rois(self) -> Regions:
        """The regions that the box head learns from: proposals and ground truth, sampled once."""
        boxes, match, labels, deltas = self._sample
        # An image without ground truth gets one zero box, as torchvision has it.
        truths = [
            target["boxes"] if len(target["boxes"]) else F.pad(target["boxes"], (0, 0, 0, 1)) for target in self.targets
        ]
        truth = [boxes[index] for boxes, index in zip(truths, match, strict=True)]
        return Regions(boxes, labels, truth, list(deltas))

    def roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (R, K+1), background first, and deltas (R, (K+1)*4), class-major."""
        return self.keep("roi_logits", boxes, self._roi_logits)

    def _roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        heads, features = self.net.roi_heads, self.roi_features(boxes)
        with self.scope(autocast=True):
            logits, deltas = heads.box_predictor(heads.box_head(features))
        return upcast(logits), upcast(deltas)

    def roi_boxes(self, boxes: Sequence[Tensor]) -> Tensor:
        """(R, K+1, 4), by the deltas of `roi_logits`."""
        deltas = self.roi_logits(boxes)[1]
        with self.scope(autocast=False):
            return cast(Tensor, self.net.roi_heads.box_coder.decode(deltas, list(boxes)))

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """loss_classifier, loss_box_reg, loss_objectness, loss_rpn_box_reg."""
        objectness, rpn_box = self._rpn_losses
        classifier, box = fastrcnn_loss(*self.roi_logits(self.rois.boxes), self.rois.labels, self.rois.deltas)
        return {
            "loss_classifier": classifier,
            "loss_box_reg": box,
            "loss_objectness": objectness,
            "loss_rpn_box_reg": rpn_box,
        }

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Detections in resized pixels; the thresholds default to the detector's own."""
        heads, proposals = self.net.roi_heads, self.proposals
        logits, deltas = self.roi_logits(proposals)
        thresholds = {"score_thresh": score, "nms_thresh": nms, "detections_per_img": top}
        with self.scope(autocast=False), temporarily(heads, **thresholds):
            found = heads.postprocess_detections(logits, deltas, proposals, self.sizes)
        return [Detections(*one) for one in zip(*found, strict=True)]


class FasterRCNN(PyramidDetector):
    """Faster R-CNN with a backbone and a feature pyramid of strides 4 to 64 (Ren et al. 2015, Lin et al. 2017).

    Arguments that torchvision has too carry its names and defaults; `score_thresh`, `nms_thresh` and
    `detections_per_img` are its `box_...` ones.

    Args:
        classes: names in label order, background left out; None takes those of `weights`.
        backbone: the network below the neck, see `options.BackboneOptions`; here and below a mapping of some options will do.
        neck_channels: channels of every level of the feature pyramid.
        anchors: of strides 4, 8, 16, 32 and 64, see `options.AnchorOptions`.
        delta_clamp: whether deltas of width and height are clamped on the ``upper`` side only, or on ``both``.
        proposal_min_size: narrower or lower proposals are dropped; 0 keeps all that have an area.
        head_channels: width of the box head's two layers.
        box_sampling_ratio: RoIAlign's sample points a bin side; 0 adapts to the region's size.
        box_roi_aligned: whether RoIAlign takes pixel centres to lie at half coordinates.
        box_level_rule: which level a region is pooled from at the bounds, see `roi_align.LEVEL_RULES`.
        box_roi_align: ``fast``, on a CPU equal to torchvision's but for rounding, or ``torchvision``; see `roi_align.region_pool`.
        pixels: channel order and statistics that the weights expect, see `options.PixelOptions`.
        min_size, max_size: written into `net.transform` for those who use it without us; a View never resizes.
        weights: of the whole detector: torchvision's name (COCO_V1), a file, or the folder of a run.
        head: where classes differ, ``keep`` takes the rows of the same name over, ``new`` starts afresh.
    """

    family = "faster_rcnn"
    enum = FasterRCNN_ResNet50_FPN_Weights
    class_layers: ClassVar[Mapping[str, int]] = {
        "roi_heads.box_predictor.cls_score": 1,
        "roi_heads.box_predictor.bbox_pred": 4,
    }
    view_class = TwoStageView
    strides = (4, 8, 16, 32, 64)
    passed_on = ("rpn_", "box_fg", "box_bg", "box_batch", "box_positive", "min_size", "max_size")

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        neck_channels: int = 256,
        anchors: AnchorOptions | Mapping[str, Any] = ANCHORS,
        delta_clamp: str = "upper",
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        proposal_min_size: float = 1e-3,
        box_sampling_ratio: int = 2,
        box_roi_aligned: bool = False,
        box_level_rule: str = "torchvision",
        box_roi_align: str = "fast",
        box_fg_iou_thresh: float = 0.5,
        box_bg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        head_channels: int = 1024,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 800,
        max_size: int = 1333,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        super().__init__(locals())

    def build_network(self, body: Any, classes: int, options: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """torchvision's network."""
        channels, head_channels = options["neck_channels"], options["head_channels"]
        pool = {name: options[f"box_{name}"] for name in ("sampling_ratio", "roi_aligned", "level_rule", "roi_align")}
        net = faster_rcnn.FasterRCNN(
            with_fpn(body, 1, channels, LastLevelMaxPool()),
            rpn_anchor_generator=anchor_generator(strides=self.strides, **options["anchors"]),
            box_roi_pool=region_pool(self.strides[:4], 7, *pool.values()),
            box_head=faster_rcnn.TwoMLPHead(channels * 7 * 7, head_channels),
            box_predictor=faster_rcnn.FastRCNNPredictor(head_channels, classes + 1),
            box_score_thresh=options["score_thresh"],
            box_nms_thresh=options["nms_thresh"],
            box_detections_per_img=options["detections_per_img"],
            **shared,
        )
        # torchvision keeps proposals whose side equals the minimum.
        net.rpn.min_size = max(options["proposal_min_size"], torch.finfo(torch.float32).tiny)
        clamp_deltas((net.rpn, net.roi_heads), options["delta_clamp"])
        self.extend(net.roi_heads, channels, classes)
        return net

    @staticmethod
    def extend(heads: Any, channels: int, classes: int) -> None:
        """Add to torchvision's `roi_heads` what a subclass needs, given the neck's channels and the number of classes."""
