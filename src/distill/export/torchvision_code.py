"""A student as plain torchvision: three lines of Python that build its network and load its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.detectors.anchors import DEFAULTS
from distill.detectors.backbones import DEPTHS, ENDS, RESNET
from distill.detectors.base import Detector
from distill.types import Detections, DistillError

EPS = 1e-5
"""Epsilon of torchvision's batch norms."""
CONVERTED = ("pixels.channel_order",)
"""Settings that torchvision does not have, but that converted weights can express."""
OTHER_DEFAULTS = {"detection_rule": "torchvision", "level_scales": False, "box_head": "regression", "input_stride": 1}
"""Further options of which torchvision has one value only -> this value."""
TWO_STAGE = ("rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "rpn_nms_thresh")
THRESHOLDS = ("score_thresh", "nms_thresh", "detections_per_img")


def inexpressible_settings(detector: Detector) -> list[str]:
    """Settings of a detector that torchvision's classes do not have, with their values."""
    options = detector.options
    backbone = options["backbone"]
    found = [
        f"{name}={_value(options, name)}"
        for name, default in DEFAULTS.items()
        if name not in CONVERTED and _value(options, name, default) != default
    ]
    if backbone["name"] != "resnet" and ENDS.get(backbone["name"]) != RESNET:
        found.append(f"backbone.name={backbone['name']} (torchvision's builders: ResNets and ResNeXts)")
    found += [f"backbone.width={backbone['width']:g}"] if backbone["width"] != 1 else []
    found += ["backbone.stride_in_1x1=true"] if backbone["stride_in_1x1"] else []
    found += ["data.antialias=true"] if detector.resize.antialias else []
    found += [f"data.pad_to={detector.resize.pad_to}"] if detector.resize.pad_to != 32 else []
    found += [f"{name}={options[name]}" for name, value in OTHER_DEFAULTS.items() if options.get(name, value) != value]
    if detector.family == "fcos" and options.get("head_norm", "group") != "group":
        found.append(f"head_norm={options['head_norm']}")
    found += ["p6_from=lateral"] if options.get("p6_from") == "lateral" else []
    found += ["head_norm=group_bias"] if options.get("head_norm") == "group_bias" else []
    if options.get("p6_from") == "c5" and detector.spec.body[32] == options["neck_channels"]:
        found.append("p6_from=c5 with as many channels in C5 as in the neck")
    if detector.family not in BUILDERS:
        found.append(f"the family {detector.family}")
    return found


def torchvision_code(detector: Detector, file: str) -> str:
    """A Python program whose last three lines build plain torchvision's network and load its weights.

    Args:
        detector: the student.
        file: name of the file with the weights.

    Raises:
        DistillError: the student has a setting that torchvision does not have.
    """
    if found := inexpressible_settings(detector):
        raise DistillError(
            f"--to torchvision: torchvision's classes do not have {', '.join(found)}. Use --to onnx or torchscript, "
            "or train a student with torchvision's settings (model=frcnn_r50, frcnn_r18, retinanet_r50, fcos_r50, …)"
        )
    options = detector.options
    body, neck = list(detector.spec.body.values()), options["neck_channels"]
    dense = "rois" not in detector.spec.outputs
    first, top = (
        (1, f"LastLevelP6P7({body[-1] if options['p6_from'] == 'c5' else neck}, {neck})") if dense else (0, None)
    )
    layers = {f"layer{index + 1}": str(index - first) for index in range(first, 4)}
    further = (f", extra_blocks={top}" if top else "") + _norm(options.get("neck_norm"))
    lines = [
        f"backbone = BackboneWithFPN({_body(options['backbone'])}, {layers}, {body[first:]}, {neck}{further})",
        BUILDERS[detector.family](detector),
        f'net.load_state_dict(torch.load("{file}", weights_only=True))',
    ]
    return IMPORTS + "\n".join(lines) + "\n"


IMPORTS = """\
# Plain torchvision: the last three lines build the network and load its weights. It takes images in [0, 1].
from functools import partial  # noqa: F401

import torch
from torchvision.models import resnet  # noqa: F401
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet  # noqa: F401
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: F401
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead  # noqa: F401
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor  # noqa: F401
from torchvision.models.detection.retinanet import RetinaNetHead  # noqa: F401
from torchvision.models.detection.rpn import RPNHead  # noqa: F401
from torchvision.ops import MultiScaleRoIAlign  # noqa: F401
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: F401

"""


def torchvision_state(detector: Detector) -> dict[str, Tensor]:
    """The weights for torchvision's network: as in `student.pt`, with the pixels and norms that torchvision assumes.

    A first convolution that expects BGR gets its input channels reversed. The epsilon of a batch norm is moved into its
    variance: v + e = (v + e - 1e-5) + 1e-5.
    """
    state = {name: value.detach().cpu().clone() for name, value in detector.net.state_dict().items()}
    if detector.options["pixels"]["channel_order"] == "bgr":
        first = next(name for name, value in state.items() if value.dim() == 4 and value.shape[1] == 3)
        state[first] = state[first].flip(1)
    for name, module in detector.net.named_modules():
        if getattr(module, "running_var", None) is not None:
            state[f"{name}.running_var"] += module.eps - EPS
    return state


def detect_with_torchvision(net: Any) -> Callable[[Tensor], Detections]:
    """A plain torchvision network as a program: from an image (3, H, W) uint8 to its detections."""
    net.eval()

    @torch.no_grad()
    def detect(image: Tensor) -> Detections:
        found = net([image.to(torch.float32) / 255])[0]
        keep = found["labels"] > 0  # a RetinaNet has an output for label 0, which distill leaves out
        masks = found["masks"][keep, 0] > 0.5 if "masks" in found else None
        return Detections(found["boxes"][keep], found["scores"][keep], found["labels"][keep], masks)

    return detect


def _body(backbone: Mapping[str, Any]) -> str:
    if backbone["name"] != "resnet":
        return f"resnet.{backbone['name']}()"
    block, counts = DEPTHS[backbone["depth"]]
    return f"resnet.ResNet(resnet.{block.__name__}, {list(counts)})"


def _shared(detector: Detector) -> list[str]:
    """Arguments that all of torchvision's families have: sizes and pixels."""
    options = detector.options
    pixels, flip = options["pixels"], -1 if options["pixels"]["channel_order"] == "bgr" else 1
    return [
        f"min_size={options['min_size']}",
        f"max_size={options['max_size']}",
        f"image_mean={list(pixels['mean'])[::flip]}",
        f"image_std={list(pixels['std'])[::flip]}",
    ]


def _anchors(detector: Detector) -> str:
    anchors = detector.options["anchors"]
    sizes, ratios = tuple(map(tuple, anchors["sizes"])), tuple(anchors["ratios"])
    return f"AnchorGenerator({sizes}, ({ratios},) * {len(sizes)})"


def _two_stage(detector: Detector, kind: str = "FasterRCNN", further: tuple[str, ...] = ()) -> str:
    options, outputs = detector.options, len(detector.classes) + 1
    width, sampling = options["head_channels"], options["box_sampling_ratio"]
    arguments = [
        *_shared(detector),
        *(f"{name}={options[name]}" for name in TWO_STAGE),
        *(f"box_{name}={options[name]}" for name in THRESHOLDS),
        f"rpn_anchor_generator={_anchors(detector)}",
        f"box_roi_pool=MultiScaleRoIAlign(list('0123'), 7, {sampling})",
        *_rpn_head(options, next(iter(detector.spec.anchors.values()))),
        f"box_head={_box_head(options)}",
        f"box_predictor=FastRCNNPredictor({width}, {outputs})",
        *further,
    ]
    return f"net = {kind}(backbone, {', '.join(arguments)})"


def _norm(option: str | None) -> str:
    """The argument of torchvision's classes for a norm."""
    return ", norm_layer=torch.nn.BatchNorm2d" if option == "batch" else ""


def _rpn_head(options: Mapping[str, Any], per_cell: int) -> list[str]:
    depth = options["rpn_convs"]
    return [] if depth == 1 else [f"rpn_head=RPNHead({options['neck_channels']}, {per_cell}, {depth})"]


def _box_head(options: Mapping[str, Any]) -> str:
    channels, width, convolutions = options["neck_channels"], options["head_channels"], options["box_convs"]
    if not convolutions:
        return f"TwoMLPHead({channels * 49}, {width})"
    return (
        f"FastRCNNConvFCHead(({channels}, 7, 7), [{channels}] * {convolutions}, [{width}]{_norm(options['head_norm'])})"
    )


def _mask_rcnn(detector: Detector) -> str:
    channels, sampling = detector.options["neck_channels"], detector.options["box_sampling_ratio"]
    further = (
        f"mask_roi_pool=MultiScaleRoIAlign(list('0123'), 14, {sampling})",
        f"mask_head=MaskRCNNHeads({channels}, [{channels}] * 4, 1{_norm(detector.options['head_norm'])})",
        f"mask_predictor=MaskRCNNPredictor({channels}, {channels}, {len(detector.classes) + 1})",
    )
    return _two_stage(detector, "MaskRCNN", further)


def _retinanet(detector: Detector) -> str:
    options, outputs = detector.options, len(detector.classes) + 1
    per_cell = next(iter(detector.spec.anchors.values()))
    norm = ", partial(torch.nn.GroupNorm, 32)" if options["head_norm"] == "group" else ""
    arguments = [
        *_shared(detector),
        *(f"{name}={options[name]}" for name in (*THRESHOLDS, "topk_candidates")),
        f"anchor_generator={_anchors(detector)}",
        f"head=RetinaNetHead({options['neck_channels']}, {per_cell}, {outputs}{norm})",
    ]
    return f"net = RetinaNet(backbone, {outputs}, {', '.join(arguments)})"


def _fcos(detector: Detector) -> str:
    options = detector.options
    arguments = [*_shared(detector), *(f"{name}={options[name]}" for name in (*THRESHOLDS, "topk_candidates"))]
    return f"net = FCOS(backbone, {len(detector.classes) + 1}, {', '.join(arguments)})"


BUILDERS: dict[str, Callable[[Detector], str]] = {
    "faster_rcnn": _two_stage,
    "mask_rcnn": _mask_rcnn,
    "retinanet": _retinanet,
    "fcos": _fcos,
}
"""Family -> the line that builds torchvision's network."""


def _value(options: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The option with a dotted name; `default` if the family does not have it."""
    group, _, key = name.partition(".")
    return options.get(group, default) if not key else options.get(group, {}).get(key, default)
