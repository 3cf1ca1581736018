"""Options for weights from other frameworks, whose anchors, boxes and pixels differ from torchvision's.

Weights load with any value of these options, but they give correct results only with the values used in training. Every
default is torchvision's value. With the defaults, the functions return torchvision's own classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from distill.types import DistillError

DEFAULTS: dict[str, Any] = {
    "pixels.channel_order": "rgb",
    "anchors.offset": 0.0,
    "anchors.rounded": True,
    "anchors.order": "ratio",
    "anchors.step": "fitted",
    "delta_clamp": "upper",
    "proposal_min_size": 1e-3,
    "box_roi_aligned": False,
    "box_level_rule": "torchvision",
    "p7_relu": True,
    "anchor_delta_weights": [1.0, 1.0, 1.0, 1.0],
    "box_delta_weights": [10.0, 10.0, 5.0, 5.0],
    "point_offset": 0.0,
    "point_step": "fitted",
    "centerness_from": "box",
    "distances": "relu",
}
"""Dotted path of an option of this module or of `roi_align` -> torchvision's value."""


def choose(option: str, value: str, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of the allowed words.

    Raises:
        DistillError: `value` is not allowed. The message names `option`.
    """
    if value not in allowed:
        raise DistillError(f"{option}: expected {' or '.join(allowed)}, got {value!r}")
    return value


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's AnchorGenerator with the options of `anchor_generator` that torchvision does not have."""

    def __init__(
        self, sizes: Any, ratios: Any, strides: Sequence[int] | None, offset: float, round: bool, by_size: bool
    ):
        self.strides, self.offset, self.round, self.by_size = strides, offset, round, by_size
        super().__init__(sizes, ratios)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the anchors (A, 4) of one cell, centered at 0."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.stack(
            [sizes[None, :] / roots[:, None], sizes[None, :] * roots[:, None]]
        )  # (w and h, ratio, size)
        w, h = (sides.transpose(1, 2) if self.by_size else sides).flatten(1)
        anchors = torch.stack([-w, -h, w, h], dim=1) / 2
        return anchors.round() if self.round else anchors

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        """Return the anchors (H*W*A, 4) of each level."""
        steps = strides if self.strides is None else [[stride, stride] for stride in self.strides]
        anchors = super().grid_anchors(grid_sizes, steps)
        shifts = [
            boxes.new_tensor([dx, dy, dx, dy]) * self.offset for boxes, (dy, dx) in zip(anchors, steps, strict=True)
        ]
        return [boxes + shift for boxes, shift in zip(anchors, shifts, strict=True)]


def anchor_generator(
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    strides: Sequence[int],
    offset: float = 0.0,
    rounded: bool = True,
    order: str = "ratio",
    step: str = "fitted",
) -> Any:
    """Return torchvision's AnchorGenerator, or `Anchors`, for five levels.

    The levels share one head, so all levels have the same number of anchors per cell.

    Args:
        sizes: anchor sides in pixels, one list for each level.
        ratios: height / width of the anchors.
        strides: nominal strides of the levels.
        offset: the center of a cell's anchors, in steps from the upper left corner of the cell; 0.5 is the middle.
        rounded: whether anchor corners, relative to the center, are rounded to whole pixels.
        order: the outer loop over the anchors of a cell: ``ratio`` (torchvision), or ``size`` (Detectron2).
        step: the distance between neighboring cells: ``fitted``, the image's side // the map's side, or ``nominal``,
            the stride of the level. The two differ if the padded side is not a multiple of the stride.

    Raises:
        DistillError: an option has an invalid value.
    """
    if len(sizes) != 5 or len({len(level) for level in sizes}) != 1 or not all(sizes) or not ratios:
        raise DistillError(
            "anchors.sizes: expected 5 lists (a level each) of equally many sizes, and at least one of anchors.ratios,"
            f" got {sizes} and {ratios}"
        )
    by_size = choose("anchors.order", order, ("ratio", "size")) == "size"
    nominal = choose("anchors.step", step, ("fitted", "nominal")) == "nominal"
    if not 0 <= offset <= 1:
        raise DistillError(
            f"anchors.offset: expected 0 (a cell's corner) to 1, in steps; 0.5 is its middle, got {offset!r}"
        )
    levels = tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes)
    if rounded and not (by_size or nominal or offset):
        return AnchorGenerator(*levels)
    return Anchors(*levels, strides if nominal else None, offset, rounded, by_size)


class TwoSidedBoxCoder(BoxCoder):  # type: ignore[misc]
    """torchvision's BoxCoder that also clamps the deltas of width and height from below (MMDetection).

    No side of a box is shorter than 1/62.5 of the side of its anchor.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Decode deltas (N, 4*K) at anchors (N, 4) to boxes (N, 4*K)."""
        codes = rel_codes.view(rel_codes.shape[0], rel_codes.shape[1] // 4, 4)
        floor = torch.tensor(self.weights[2:], dtype=codes.dtype, device=codes.device) * -self.bbox_xform_clip
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(floor)], dim=-1)
        decoded: Tensor = super().decode_single(codes.flatten(1), boxes)
        return decoded


def set_box_coders(parts: Sequence[Any], delta_clamp: str, weights: Sequence[float], option: str) -> None:
    """Set the weights of the deltas, and the clamping of width and height, in the `box_coder` of each part.

    Args:
        parts: modules with an attribute `box_coder`.
        delta_clamp: ``upper`` clamps large deltas only (torchvision); ``both`` also clamps small deltas.
        weights: factors on the deltas (x, y, width, height): deltas / weights are shifts in sides of the anchor, and
            logarithms of the sides' ratios. The reciprocals are MMDetection's ``target_stds``.
        option: the name of `weights`, for the message.

    Raises:
        DistillError: `delta_clamp` has another value, or `weights` is not four numbers above 0.
    """
    if len(weights) != 4 or not all(weight > 0 for weight in weights):
        raise DistillError(f"{option}: expected four numbers above 0 (x, y, width, height), got {list(weights)}")
    kind = TwoSidedBoxCoder if choose("delta_clamp", delta_clamp, ("upper", "both")) == "both" else BoxCoder
    for part in parts:
        part.box_coder = kind(tuple(weights), part.box_coder.bbox_xform_clip)


class LateralP6P7(LastLevelP6P7):  # type: ignore[misc]
    """P6 and P7 on top of the pyramid's lateral map of C5, which is P5 before its 3x3 convolution (MMDetection).

    `lateral` holds the lateral convolution, and is set when the pyramid has been built.
    """

    lateral: tuple[Any, ...] = ()

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__(channels, channels)
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the levels, and their names to the names."""
        p6 = self.p6(self.lateral[0](c[-1]))
        return [*p, p6, self.p7(torch.relu(p6) if self.relu else p6)], [*names, "p6", "p7"]


class LinearP6P7(LastLevelP6P7):  # type: ignore[misc]
    """torchvision's P6 and P7, without the ReLU between P6 and the convolution that computes P7."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the levels, and their names to the names."""
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


def p6_p7(c5_channels: int, neck_channels: int, p6_from: str, relu: bool) -> Any:
    """Return the module that computes P6 and P7 of a RetinaNet or FCOS.

    Args:
        c5_channels: channels of C5.
        neck_channels: channels of P5, P6 and P7.
        p6_from: the input of P6: ``p5``, ``c5``, or ``lateral``, see `LateralP6P7`.
        relu: whether a ReLU stands between P6 and the convolution that computes P7.

    Raises:
        DistillError: `p6_from` has another value.
    """
    if choose("p6_from", p6_from, ("p5", "c5", "lateral")) == "lateral":
        return LateralP6P7(neck_channels, relu)
    from_p5 = p6_from == "p5"
    levels = (LastLevelP6P7 if relu else LinearP6P7)(neck_channels if from_p5 else c5_channels, neck_channels)
    levels.use_P5 = from_p5  # torchvision infers it from the channels, wrongly if C5 is as wide as the neck
    return levels


class BGRTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform for RGB images, with BGR output."""

    def normalize(self, image: Tensor) -> Tensor:
        """Return an RGB image (3, H, W) in [0, 1] as normalized BGR."""
        normalized: Tensor = super().normalize(image.flip(0))
        return normalized


def order_channels(net: Any, channel_order: str) -> None:
    """Set the channel order that the weights of `net` expect, for uses of `net` without a View.

    Args:
        net: torchvision's network. Its transform takes RGB images.
        channel_order: ``rgb`` or ``bgr``.

    Raises:
        DistillError: `channel_order` has another value.
    """
    if choose("pixels.channel_order", channel_order, ("rgb", "bgr")) == "bgr":
        own = net.transform
        net.transform = BGRTransform(own.min_size, own.max_size, own.image_mean, own.image_std)
