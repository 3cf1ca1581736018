"""Resize and padding of images, and resize of boxes.

Student and teacher share one resize. Its size rule is that of torchvision's detection models: with ``scale =
min(min_size / shorter, max_size / longer)``, the new side is ``floor(side * scale)``. The interpolation is bilinear, by
default without antialiasing, because torchvision's COCO weights were trained and measured without it. Unlike
torchvision's, the result is uint8, rounded once per axis: the difference is less than one gray level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distill.types import DistillError, Size

SHAPES = ("ratio", "square")


class ResizeOptions(NamedTuple):
    """How images are resized and padded, besides the sizes."""

    antialias: bool = False
    """Whether a low-pass filter is applied before an image is reduced."""
    pad_to: int = 32
    """The sides of a padded image are multiples of this number of pixels."""
    shape: str = "ratio"
    """``ratio`` keeps the ratio of the sides; ``square`` gives both sides the length of the shorter one."""


def read_resize_options(options: Mapping[str, Any], defaults: ResizeOptions) -> ResizeOptions:
    """Return resize options from plain containers, such as a file of a run, with defaults for those that it lacks.

    Raises:
        DistillError: a name or a value is invalid.
    """
    try:
        resize = defaults._replace(**options)
        if not (isinstance(resize.antialias, bool) and isinstance(resize.pad_to, int) and resize.pad_to > 0):
            raise ValueError("antialias is true or false, pad_to a number of pixels")
        if resize.shape not in SHAPES:
            raise ValueError(f"shape is {' or '.join(SHAPES)}")
    except (TypeError, ValueError) as error:
        raise DistillError(f"expected 'resize': {error}") from error
    return resize


def resized_size(size: Size, min_size: int, max_size: int, shape: str = "ratio") -> Size:
    """Return (height, width) after the resize. No side is below one pixel.

    Args:
        size: (height, width) of the original image.
        min_size: wanted length of the shorter side.
        max_size: greatest length of the longer side. It takes precedence over ``min_size``.
        shape: see `ResizeOptions`. With ``square``, both sides have the length of the smaller limit.
    """
    if shape == "square":
        return min(min_size, max_size), min(min_size, max_size)
    scale = min(min_size / min(size), max_size / max(size))
    height, width = (max(1, math.floor(side * scale)) for side in size)
    return height, width


def resize_image(image: Tensor, size: Size, antialias: bool = False, mirrored: bool = False) -> Tensor:
    """Resize a uint8 image to (height, width) by bilinear interpolation, and optionally mirror it.

    The smaller of the two images is mirrored, which is faster. Mirroring before or after the resize gives the same bits
    where torch interpolates with integer weights (x86).
    """
    enlarges = image.shape[-2] < size[0]
    if mirrored and enlarges:
        image = image.flip(-1)
    if image.shape[-2:] != size:
        image = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)
    return image.flip(-1) if mirrored and not enlarges else image


def resize_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Scale boxes (N, 4) xyxy from an image of size ``old`` to one of size ``new``.

    Each axis has its own ratio, because the size rule rounds each side down.
    """
    y_scale, x_scale = (after / before for before, after in zip(old, new, strict=True))
    return boxes * torch.tensor([x_scale, y_scale, x_scale, y_scale])


def padded_size(sizes: Sequence[Size], pad_to: int) -> Size:
    """Return the smallest (height, width) that holds all sizes. Both sides are multiples of ``pad_to``."""
    height, width = (math.ceil(max(sides) / pad_to) * pad_to for sides in zip(*sizes, strict=True))
    return height, width


def copy_padded(images: Iterable[Tensor], canvases: Tensor) -> None:
    """Copy images (3, h, w) into the upper left corners of canvases (B, 3, H, W), and fill the rest with zeros."""
    for image, canvas in zip(images, canvases, strict=True):
        height, width = image.shape[-2:]
        canvas[:, :height, :width] = image
        canvas[:, height:] = 0
        canvas[:, :height, width:] = 0


def average_squares(images: Tensor, side: int) -> Tensor:
    """Average images (B, 3, H, W) over squares of `side` x `side` pixels: the network below sees a smaller image."""
    return images if side == 1 else avg_pool2d(images, side, ceil_mode=True, count_include_pad=False)
