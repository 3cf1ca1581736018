"""The nested options of detectors and their defaults: `backbone`, `anchors` and `pixels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BackboneOptions:
    """The network below the neck.

    Args:
        name: ``resnet``; one of torchvision's resnext50_32x4d, resnext101_32x8d, resnext101_64x4d, mobilenet_v2,
            mobilenet_v3_large, mobilenet_v3_small, efficientnet_b0 to b7; or ``timm/NAME`` (see
            `backbones.build_backbone`).
        depth: depth of the ResNet: 10 (one basic block per stage), 18, 34, 50, 101 or 152. None means 50. Other
            backbones accept only None.
        width: factor on the channels of every stage of a ResNet or MobileNet. 0.25 is the quarter ResNet of DeFeat.
        norm: ``frozen`` (fixed statistics, weight and bias), ``batch_fixed_stats`` (fixed statistics only), ``batch``,
            or ``sync`` (statistics over all processes; on a CPU equal to ``batch``).
        norm_eps: epsilon of the norms. Weights that need another epsilon change it. None means the backbone's own
            epsilon (1e-5 for a ResNet).
        stride_in_1x1: see `backbones.ResNet`.
        groups: see `backbones.ResNet`.
        group_width: see `backbones.ResNet`.
        trainable_stages: how many of C5, C4, C3, C2 and the stem are trained, in this order. The statistics of the
            other stages are fixed too.
        weights: ImageNet weights: torchvision's name (IMAGENET1K_V1, ...) or a file. They are not used if the detector
            has weights of its own.
    """

    name: str = "resnet"
    depth: int | None = None
    width: float = 1.0
    norm: str = "batch"
    norm_eps: float | None = None
    stride_in_1x1: bool = False
    groups: int = 1
    group_width: int = 64
    trainable_stages: int = 5
    weights: str | None = None


@dataclass(frozen=True)
class AnchorOptions:
    """Anchors of five levels, see `anchors.anchor_generator`. The defaults are those of torchvision's Faster R-CNN.

    Args:
        sizes: anchor sides in pixels, one list for each level.
        ratios: height / width of the anchors.
        offset: the center of an anchor in its cell: 0 is the upper left corner, 0.5 the middle.
        rounded: whether corners, relative to the center, are rounded to whole pixels.
        order: the outer loop over the anchors of a cell: ``ratio`` or ``size``.
        step: the distance between neighboring cells: ``fitted`` to the padded image, or ``nominal``, the stride.
    """

    sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,))
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    offset: float = 0.0
    rounded: bool = True
    order: str = "ratio"
    step: str = "fitted"


@dataclass(frozen=True)
class PixelOptions:
    """The pixels that the weights expect. Batches are always RGB; the View converts them.

    Args:
        channel_order: ``rgb`` or ``bgr``.
        mean: channel means of pixels in [0, 1], in `channel_order`.
        std: channel standard deviations of pixels in [0, 1], in `channel_order`.
    """

    channel_order: str = "rgb"
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)


BACKBONE, ANCHORS, PIXELS = BackboneOptions(), AnchorOptions(), PixelOptions()


def to_plain(value: Any) -> Any:
    """Convert options to the containers of JSON: dictionaries and lists."""
    if isinstance(value, (BackboneOptions, AnchorOptions, PixelOptions)):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {name: to_plain(inner) for name, inner in value.items()}
    return [to_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
