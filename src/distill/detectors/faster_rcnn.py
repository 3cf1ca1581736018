"""Faster R-CNN with a backbone and a feature pyramid: torchvision's model and its View."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, faster_rcnn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from distill.detectors.anchors import anchor_generator, choose, set_box_coders
from distill.detectors.backbones import with_fpn
from distill.detectors.detection_rules import with_rule
from distill.detectors.options import ANCHORS, BACKBONE, PIXELS, AnchorOptions, BackboneOptions, PixelOptions
from distill.detectors.pyramid import PyramidDetector
from distill.detectors.roi_align import region_pool
from distill.detectors.view import PyramidView, geometry, network, temporarily
from distill.precision import upcast
from distill.types import AnchorTargets, Detections, DistillError, Pyramid, Regions

NORMS: dict[str, Callable[..., nn.Module] | None] = {"none": None, "batch": nn.BatchNorm2d}
"""Norm of the pyramid and the heads -> its constructor."""


class FasterRCNNView(PyramidView):
    """The View of a Faster R-CNN."""

    outputs = PyramidView.outputs | {"objectness", "proposals", "rois", "roi_logits", "roi_boxes"}

    @property
    def generator(self) -> Any:
        """torchvision's AnchorGenerator."""
        return self.net.rpn.anchor_generator

    @property
    def pool(self) -> Any:
        """RoIAlign over P2 to P5."""
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
        """Proposals (P, 4) of each image, clipped, after NMS, best first, detached."""
        rpn, (objectness, deltas) = self.net.rpn, self._flat
        boxes = rpn.box_coder.decode(deltas.detach(), self._image_anchors).view(len(self.batch), -1, 4)
        counts = [level.shape[0] for level in self.anchors.values()]
        with temporarily(rpn, training=self.training):
            return list(rpn.filter_proposals(boxes, objectness, self.sizes, counts)[0])

    @geometry
    def _rpn_targets(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Labels and regression targets of all anchors, one tensor per image."""
        rpn, anchors = self.net.rpn, self._image_anchors
        labels, truth = rpn.assign_targets_to_anchors(anchors, self.targets)
        return labels, rpn.box_coder.encode(truth, anchors)

    @geometry
    def _rpn_sample(self) -> tuple[list[Tensor], list[Tensor]]:
        """Indicators (N,) of the sampled positive and of the sampled negative anchors of each image. Sampled once."""
        if self.seed is None:
            _ = self.body  # a body with random drop path draws before the sampler in torchvision
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
        """Targets of the RPN: an anchor on an object of any class has label 1."""
        sampled = [positive | negative for positive, negative in zip(*self._rpn_sample, strict=True)]
        labels, deltas = self._rpn_targets
        return AnchorTargets(torch.stack(labels).long(), torch.stack(list(deltas)), torch.stack(sampled) > 0)

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return cast(Tensor, self.net.rpn.box_coder.decode_single(deltas, anchors))

    @geometry
    def _sample(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, indices of the matched ground truth, labels and regression targets of the sampled regions."""
        if self.seed is None:
            _ = self._rpn_sample  # torchvision draws it first; with a seed, each draw has its own random stream
        with self.draw(1):
            sample = self.net.roi_heads.select_training_samples(self.proposals, self.targets)
        return cast("tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]", sample)

    @geometry
    def rois(self) -> Regions:
        """Regions that the box head is trained on, sampled once from proposals and ground truth."""
        boxes, match, labels, deltas = self._sample
        # As in torchvision, an image without ground truth gets one zero box.
        truths = [
            target["boxes"] if len(target["boxes"]) else F.pad(target["boxes"], (0, 0, 0, 1)) for target in self.targets
        ]
        truth = [boxes[index] for boxes, index in zip(truths, match, strict=True)]
        return Regions(boxes, labels, truth, list(deltas))

    def roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits (R, K+1) and deltas (R, (K+1)*4). Background is first; a class has 4 adjacent deltas."""
        return self.keep("roi_logits", boxes, self._roi_logits)

    def _roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        heads, features = self.net.roi_heads, self.roi_features(boxes)
        with self.scope(autocast=True):
            logits, deltas = heads.box_predictor(heads.box_head(features))
        return upcast(logits), upcast(deltas)

    def roi_boxes(self, boxes: Sequence[Tensor]) -> Tensor:
        """Apply the deltas of `roi_logits` to the regions; return boxes (R, K+1, 4), not clipped."""
        deltas = self.roi_logits(boxes)[1]
        with self.scope(autocast=False):
            return cast(Tensor, self.net.roi_heads.box_coder.decode(deltas, list(boxes)))

    @geometry
    def losses(self) -> dict[str, Tensor]:
        """The losses ``loss_classifier``, ``loss_box_reg``, ``loss_objectness`` and ``loss_rpn_box_reg``."""
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
        """Return the detections in pixels of the resized image. A threshold of None is the detector's own."""
        heads, proposals = self.net.roi_heads, self.proposals
        logits, deltas = self.roi_logits(proposals)
        thresholds = {"score_thresh": score, "nms_thresh": nms, "detections_per_img": top}
        with self.scope(autocast=False), temporarily(heads, **thresholds):
            images = heads.postprocess_detections(logits, deltas, proposals, self.sizes)
        return [Detections(*image) for image in zip(*images, strict=True)]


class FasterRCNN(PyramidDetector):
    """Faster R-CNN with a backbone and a feature pyramid of strides 4 to 64 (Ren et al. 2015, Lin et al. 2017).

    Arguments that torchvision also has keep torchvision's names and defaults. `score_thresh`, `nms_thresh` and
    `detections_per_img` are torchvision's arguments with the prefix `box_`. `backbone`, `anchors` and `pixels` also
    accept a mapping with some of the options.

    The defaults are torchvision's version 1. ``neck_norm="batch", rpn_convs=2, box_convs=4, head_norm="batch"`` is
    version 2.

    Args:
        classes: class names in label order, without background. None means the classes of `weights`.
        backbone: the network below the neck, see `options.BackboneOptions`.
        input_stride: 1, 2 or 4: side in pixels of the squares over which the image is averaged for the network. All
            strides are multiplied by it; the sizes of anchors and boxes stay in pixels of the image.
        neck_channels: channels of every level of the feature pyramid.
        anchors: anchors of the strides 4, 8, 16, 32 and 64, see `options.AnchorOptions`.
        delta_clamp: whether deltas of width and height are clamped on the ``upper`` side only, or on ``both`` sides.
        anchor_delta_weights: factors on the deltas of the RPN, see `anchors.set_box_coders`.
        box_delta_weights: factors on the deltas of the box head. torchvision's name is `bbox_reg_weights`.
        proposal_min_size: the smallest width and height of a proposal in pixels. 0 keeps every proposal with an area.
        head_channels: width of the linear layers of the box head.
        neck_norm: norm after each convolution of the pyramid, ``none`` or ``batch``.
        rpn_convs: number of 3x3 convolutions in the RPN's head.
        box_convs: number of 3x3 convolutions in the box head, before one linear layer; 0: two linear layers and no
            convolution.
        head_norm: norm after each convolution of the box head and the mask head, ``none`` or ``batch``.
        box_sampling_ratio: RoIAlign's sample points per side of a bin. 0 adapts the number to the size of the region.
        box_roi_aligned: whether RoIAlign assumes pixel centers at half coordinates.
        box_level_rule: the formula that assigns a region to a pyramid level, see `roi_align.LEVEL_RULES`.
        box_roi_align: ``fast``, which on a CPU equals torchvision's RoIAlign except for rounding, or ``torchvision``.
            See `roi_align.region_pool`.
        detection_rule: the rule for the final detections, see `detection_rules`.
        pixels: channel order and statistics that the weights expect, see `options.PixelOptions`.
        min_size: set in `net.transform`, for uses of `net` without a View. A View never resizes images.
        max_size: set in `net.transform`, see `min_size`.
        weights: weights of the whole detector: torchvision's name (COCO_V1), a file, or a run's folder or checkpoint.
        head: what to do if the classes differ from those of `weights`: ``keep`` copies the rows of classes with the
            same name and expects all of them, ``match`` starts missing classes afresh, ``new`` starts all of them
            afresh.

    Raises:
        DistillError: an option has an invalid value, or the weights do not fit.
    """

    family = "faster_rcnn"
    enum = FasterRCNN_ResNet50_FPN_Weights
    class_layers: Mapping[str, int] = {
        "roi_heads.box_predictor.cls_score": 1,
        "roi_heads.box_predictor.bbox_pred": 4,
    }
    view_class = FasterRCNNView
    level_strides = (4, 8, 16, 32, 64)
    passed_on = ("rpn_", "box_fg", "box_bg", "box_batch", "box_positive", "min_size", "max_size")

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        backbone: BackboneOptions | Mapping[str, Any] = BACKBONE,
        input_stride: int = 1,
        neck_channels: int = 256,
        anchors: AnchorOptions | Mapping[str, Any] = ANCHORS,
        delta_clamp: str = "upper",
        anchor_delta_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        box_delta_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
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
        neck_norm: str = "none",
        rpn_convs: int = 1,
        box_convs: int = 0,
        head_norm: str = "none",
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        detection_rule: str = "torchvision",
        pixels: PixelOptions | Mapping[str, Any] = PIXELS,
        min_size: int = 800,
        max_size: int = 1333,
        weights: str | None = None,
        head: str = "keep",
    ) -> None:
        choose("neck_norm", neck_norm, tuple(NORMS))
        choose("head_norm", head_norm, tuple(NORMS))
        if rpn_convs < 1 or box_convs < 0:
            raise DistillError(
                f"expected rpn_convs of 1 or more and box_convs of 0 or more, got {rpn_convs} and {box_convs}"
            )
        super().__init__(locals())

    def build_network(self, body: Any, classes: int, options: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """Build torchvision's Faster R-CNN."""
        channels, head_channels = options["neck_channels"], options["head_channels"]
        pool = {name: options[f"box_{name}"] for name in ("sampling_ratio", "roi_aligned", "level_rule", "roi_align")}
        neck_norm, head_norm = NORMS[options["neck_norm"]], NORMS[options["head_norm"]]
        generator = anchor_generator(strides=self.strides, **options["anchors"])
        backbone = with_fpn(body, 1, channels, LastLevelMaxPool(), neck_norm)
        per_cell = generator.num_anchors_per_location()[0]
        if options["box_convs"]:
            convolutions = [channels] * options["box_convs"]
            box_head = faster_rcnn.FastRCNNConvFCHead((channels, 7, 7), convolutions, [head_channels], head_norm)
        else:
            box_head = faster_rcnn.TwoMLPHead(channels * 7 * 7, head_channels)
        net = faster_rcnn.FasterRCNN(
            backbone,
            rpn_anchor_generator=generator,
            rpn_head=None if options["rpn_convs"] == 1 else RPNHead(channels, per_cell, options["rpn_convs"]),
            box_roi_pool=region_pool(self.strides[:4], 7, *pool.values()),
            box_head=box_head,
            box_predictor=faster_rcnn.FastRCNNPredictor(head_channels, classes + 1),
            box_score_thresh=options["score_thresh"],
            box_nms_thresh=options["nms_thresh"],
            box_detections_per_img=options["detections_per_img"],
            **shared,
        )
        # torchvision keeps proposals whose side equals the minimum.
        net.rpn.min_size = max(options["proposal_min_size"], torch.finfo(torch.float32).tiny)
        net.roi_heads = with_rule(net.roi_heads, options["detection_rule"])
        for part, name in ((net.rpn, "anchor_delta_weights"), (net.roi_heads, "box_delta_weights")):
            set_box_coders((part,), options["delta_clamp"], options[name], name)
        self.extend(net.roi_heads, channels, classes, head_norm)
        return net

    @staticmethod
    def extend(heads: Any, channels: int, classes: int, norm_layer: Callable[..., nn.Module] | None) -> None:
        """Add the layers of a subclass to torchvision's `roi_heads`. A Faster R-CNN adds none.

        Args:
            heads: torchvision's `roi_heads`.
            channels: channels of the neck.
            classes: number of classes, without background.
            norm_layer: constructor of the norm after each convolution; None: no norms.
        """
