"""Resize of images, boxes and masks.

Student and teacher share one resize. Its size rule is that of torchvision's detection models: with ``scale =
min(min_size / shorter, max_size / longer)``, the new side is ``floor(side * scale)``. The interpolation is bilinear, by
default without antialiasing, because torchvision's COCO weights were trained and measured without it. Unlike
torchvision's, the result is uint8, rounded once per axis: the difference is less than one gray level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distill.data import rle
from distill.types import Size


def resized_size(size: Size, min_size: int, max_size: int) -> Size:
    """Return (height, width) after the resize. No side is below one pixel.

    Args:
        size: (height, width) of the original image.
        min_size: wanted length of the shorter side.
        max_size: greatest length of the longer side. It takes precedence over ``min_size``.
    """
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


def resize_masks(codes: Sequence[bytes], old: Size, new: Size) -> Tensor:
    """Decode masks and resize them to (N, h, w) uint8 by the nearest pixel, as torchvision's detectors do.

    Masks are processed one by one, so memory holds only one mask at the size of the original image.

    Args:
        codes: N run-length codes of masks of size ``old``.
        old: (height, width) of the original image.
        new: (height, width) of the result.
    """
    masks = torch.empty(len(codes), *new, dtype=torch.uint8)
    for row, code in zip(masks, codes, strict=True):
        row.copy_(resize_mask(rle.decode_mask(code, old), new))
    return masks


def resize_mask(mask: Tensor, size: Size) -> Tensor:
    """Resize a mask (H, W) uint8 to (height, width) by the nearest pixel."""
    return interpolate(mask[None, None], size=size, mode="nearest")[0, 0]
