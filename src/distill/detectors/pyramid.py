"""The base classes of detectors with a backbone and a feature pyramid. They build a detector from its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from distill.detectors.anchors import order_channels, p6_p7
from distill.detectors.backbones import (
    Backbone,
    build_backbone,
    freeze,
    has_batch_norms,
    network_options,
    resolved_options,
    with_fpn,
)
from distill.detectors.base import Detector
from distill.detectors.options import ANCHORS, BACKBONE, PIXELS, AnchorOptions, to_plain
from distill.detectors.roi_align import region_pool
from distill.detectors.weights import class_names, initialize
from distill.type_checks import parse_options
from distill.types import DetectorSpec, DistillError

BODY_STRIDES = (4, 8, 16, 32)
"""Strides of C2 to C5 in pixels that the network sees."""
INPUT_STRIDES = (1, 2, 4)
"""Values of the option `input_stride`."""
POINT_AND_DELTA_OPTIONS = ("point_offset", "point_step", "anchor_delta_weights", "box_head")
"""Options outside of ``anchors`` that decide which box the deltas of an anchor or point stand for."""


class PyramidDetector(Detector):
    """A detector with a backbone and a feature pyramid. Each family implements `build_network`."""

    level_strides: ClassVar[tuple[int, ...]]
    """Strides of the neck's levels in pixels that the network sees."""
    passed_on: ClassVar[tuple[str, ...]]
    """Prefixes of options that torchvision's constructor takes under the same names."""
    anchor_defaults: ClassVar[AnchorOptions] = ANCHORS
    """Defaults of the family's anchor options."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Build the network and load its weights. `arguments` are the `locals()` of the family's constructor."""
        given = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        names = class_names(given["classes"], given["weights"], self.enum)
        backbone = parse_options("backbone", given["backbone"], BACKBONE)
        pixels = parse_options("pixels", given["pixels"], PIXELS)
        side = given["input_stride"]
        if isinstance(side, bool) or not isinstance(side, int) or side not in INPUT_STRIDES:
            raise DistillError(f"input_stride: expected {', '.join(map(str, INPUT_STRIDES))}, got {side!r}")
        self.strides = tuple(side * stride for stride in self.level_strides)
        """Strides of the neck's levels in pixels of the image."""
        body = build_backbone(**network_options(backbone))
        resolved = {"backbone": {**asdict(backbone), **resolved_options(body)}, "pixels": pixels}
        if "anchors" in given:
            resolved["anchors"] = parse_options("anchors", given["anchors"], self.anchor_defaults)
        options = to_plain({**given, **resolved, "classes": names})
        shared = {name: value for name, value in options.items() if name.startswith(self.passed_on)}
        net = self.build_network(
            body,
            len(names),
            options,
            {**shared, "image_mean": options["pixels"]["mean"], "image_std": options["pixels"]["std"]},
        )
        if side != 1:
            net.backbone.body.input_stride = side
        order_channels(net, pixels.channel_order)
        generator = getattr(net, "rpn", net).anchor_generator
        spec = DetectorSpec(
            family=self.family,
            outputs=self.view_class.outputs,
            classes=names,
            body=dict(zip((side * stride for stride in BODY_STRIDES), body.channels, strict=True)),
            neck=dict.fromkeys(self.strides, options["neck_channels"]),
            anchors=dict(zip(self.strides, generator.num_anchors_per_location(), strict=True)),
            mean=tuple(pixels.mean),
            std=tuple(pixels.std),
            norm=backbone.norm,
            anchor_options={
                **{f"anchors.{name}": value for name, value in options.get("anchors", {}).items()},
                **{name: options[name] for name in POINT_AND_DELTA_OPTIONS if name in options},
            },
            side_bins=options["box_bins"] if "side_logits" in self.view_class.outputs else None,
        )
        super().__init__(net, spec, options, freeze(net.backbone.body, backbone.trainable_stages))
        initialize(self, backbone.weights, given["weights"], given["head"])

    @classmethod
    def has_batch_norms(cls, backbone: Mapping[str, Any]) -> bool:
        """See the base class: many networks of timm have others, such as ConvNeXt."""
        return has_batch_norms(parse_options("backbone", backbone, BACKBONE))

    @abstractmethod
    def build_network(self, body: Any, classes: int, options: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """Build torchvision's network.

        Args:
            body: the `StagedNetwork` that `build_backbone` returns.
            classes: number of classes, without background.
            options: all options, in plain containers.
            shared: arguments of torchvision's constructor: the options with the same name, and mean and std.
        """


class DenseDetector(PyramidDetector):
    """A detector whose only heads run on every cell of the levels P3 to P7, without regions: RetinaNet and FCOS."""

    level_strides = (8, 16, 32, 64, 128)

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.pool = region_pool(self.strides, 7, 2)
        """RoIAlign over P3 to P7 for losses that read regions. torchvision's network has no RoIAlign."""

    @staticmethod
    def backbone(body: Any, options: Mapping[str, Any]) -> Backbone:
        """Build the backbone with a feature pyramid over C3 to C5, and P6 and P7 on top of the pyramid."""
        channels = options["neck_channels"]
        extra = p6_p7(body.channels[-1], channels, options["p6_from"], options["p7_relu"])
        backbone = with_fpn(body, 2, channels, extra)
        if options["p6_from"] == "lateral":
            extra.lateral = (backbone.fpn.inner_blocks[-1],)  # in a tuple, so that the pyramid alone registers it
        return backbone
