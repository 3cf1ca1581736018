"""The base class of detectors with a backbone and a feature pyramid: it builds the detector from its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from distill.detectors.anchors import order_channels
from distill.detectors.backbones import build_backbone, freeze, resolved_options
from distill.detectors.base import Detector
from distill.detectors.options import ANCHORS, BACKBONE, PIXELS, AnchorOptions, to_plain
from distill.detectors.weights import class_names, initialise
from distill.type_checks import parse_options
from distill.types import DetectorSpec

BODY_STRIDES = (4, 8, 16, 32)
"""Strides of C2 to C5."""


class PyramidDetector(Detector):
    """A detector with a backbone and a feature pyramid. Each family implements `build_network`."""

    strides: ClassVar[tuple[int, ...]]
    """Strides of the neck's levels."""
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
        body = build_backbone(
            backbone.name, backbone.depth, backbone.width, backbone.norm, backbone.norm_eps, backbone.stride_in_1x1
        )
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
        order_channels(net, pixels.channel_order)
        generator = getattr(net, "rpn", net).anchor_generator
        spec = DetectorSpec(
            family=self.family,
            outputs=self.view_class.outputs,
            classes=names,
            body=dict(zip(BODY_STRIDES, body.channels, strict=True)),
            neck=dict.fromkeys(self.strides, options["neck_channels"]),
            anchors=dict(zip(self.strides, generator.num_anchors_per_location(), strict=True)),
            mean=tuple(pixels.mean),
            std=tuple(pixels.std),
            norm=backbone.norm,
            anchor_options=options.get("anchors", {}),
        )
        super().__init__(net, spec, options, freeze(net.backbone.body, backbone.trainable_stages))
        initialise(self, backbone.weights, given["weights"], given["head"])

    @abstractmethod
    def build_network(self, body: Any, classes: int, options: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """Build torchvision's network.

        Args:
            body: the `Trunk` that `build_backbone` returns.
            classes: number of classes, without background.
            options: all options, in plain containers.
            shared: arguments of torchvision's constructor: the options with the same name, and mean and std.
        """
