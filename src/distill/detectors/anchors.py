"""Where detectors of other frameworks place boxes and pixels otherwise than torchvision's.

Weights are bound to these choices although they fit any of them. Every default is torchvision's, and gives
torchvision's own part.
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
}
"""Options of this module and of `roi_align` by dotted path -> torchvision's values."""


def choose(option: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, if it is one of the allowed words."""
    if value not in allowed:
        raise DistillError(f"{option}: expected {' or '.join(allowed)}, got {value!r}")
    return value


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors as `anchor_generator` describes them."""

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
        """(A, 4): the anchors of one cell, around 0."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.stack(
            [sizes[None, :] / roots[:, None], sizes[None, :] * roots[:, None]]
        )  # (w and h, ratio, size)
        w, h = (sides.transpose(1, 2) if self.by_size else sides).flatten(1)
        anchors = torch.stack([-w, -h, w, h], dim=1) / 2
        return anchors.round() if self.round else anchors

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        """(H*W*A, 4) of each level."""
        steps = strides if self.strides is None else [[stride, stride] for stride in self.strides]
        anchors = super().grid_anchors(grid_sizes, steps)
        shifts = [
            each.new_tensor([dx, dy, dx, dy]) * self.offset for each, (dy, dx) in zip(anchors, steps, strict=True)
        ]
        return [each + shift for each, shift in zip(anchors, shifts, strict=True)]


def anchor_generator(
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
    strides: Sequence[int],
    offset: float = 0.0,
    rounded: bool = True,
    order: str = "ratio",
    step: str = "fitted",
) -> Any:
    """torchvision's AnchorGenerator for five levels that share one head, so with equally many anchors on each.

    Args:
        sizes, ratios: sides in pixels of each level; height / width.
        strides: nominal strides of the levels.
        offset: where a cell's anchors are centred, in steps from its upper left corner; 0.5 is its middle.
        rounded: whether the corners around a centre are rounded to whole pixels.
        order: what changes last in a cell: its ``ratio``, or its ``size`` (Detectron2).
        step: from cell to cell: ``fitted``, the image's side // the map's, or ``nominal``, the level's stride. They
            differ where the padded side is no multiple of the stride.
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
    """Keeps the deltas of width and height from below too (MMDetection): no box under 1/62.5 of its anchor's side."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """(N, 4*K) deltas and (N, 4) anchors to (N, 4*K) boxes."""
        codes = rel_codes.view(len(rel_codes), -1, 4)
        floor = torch.tensor(self.weights[2:], dtype=codes.dtype, device=codes.device) * -self.bbox_xform_clip
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(floor)], dim=-1)
        decoded: Tensor = super().decode_single(codes.flatten(1), boxes)
        return decoded


def clamp_deltas(parts: Sequence[Any], delta_clamp: str) -> None:
    """Give each part, with a `box_coder`, one that clamps on the ``upper`` side only (torchvision) or on ``both``."""
    if choose("delta_clamp", delta_clamp, ("upper", "both")) == "both":
        for part in parts:
            part.box_coder = TwoSidedBoxCoder(part.box_coder.weights, part.box_coder.bbox_xform_clip)


class LinearP6P7(LastLevelP6P7):  # type: ignore[misc]
    """P7 convolved from P6 itself, without torchvision's ReLU between them."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels and their names with P6 and P7 behind them."""
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


def p6_p7(c5_channels: int, neck_channels: int, p6_from: str, relu: bool) -> Any:
    """The levels above a RetinaNet's P5, P6 from ``p5`` or ``c5``."""
    from_p5 = choose("p6_from", p6_from, ("p5", "c5")) == "p5"
    levels = (LastLevelP6P7 if relu else LinearP6P7)(neck_channels if from_p5 else c5_channels, neck_channels)
    levels.use_P5 = from_p5  # torchvision guesses it from the channels, wrongly where C5 is as wide as the neck
    return levels


class BGRTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Takes RGB images as torchvision's does, and hands them on as BGR."""

    def normalize(self, image: Tensor) -> Tensor:
        """(3, H, W) RGB in [0, 1] to normalised BGR."""
        normalised: Tensor = super().normalize(image.flip(0))
        return normalised


def order_channels(net: Any, channel_order: str) -> None:
    """Let `net`, used without a View, turn RGB images into what its weights expect: ``rgb`` or ``bgr``."""
    if choose("pixels.channel_order", channel_order, ("rgb", "bgr")) == "bgr":
        own = net.transform
        net.transform = BGRTransform(own.min_size, own.max_size, own.image_mean, own.image_std)
