"""Images of any kind as tensors: tensors, arrays, PIL images and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.imaging.decoding import read_image
from distill.types import DistillError


def as_tensor(image: Any, number: int = 0) -> Tensor:
    """Convert an image of any kind to a tensor (3, H, W) uint8.

    Args:
        image: a tensor (3 or 1, H, W) or (H, W); an array (H, W, 3 or 1) or (H, W); both uint8 or float in [0, 1]; a
            PIL image, which is turned upright by its EXIF tag; or the path of an image file. Colors are RGB.
        number: place of the image in its list, for messages.

    Raises:
        DistillError: the image has another type or shape, or its file cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    pixels = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    if isinstance(image, np.ndarray) and pixels.dim() == 3:
        pixels = pixels.permute(2, 0, 1)
    if isinstance(pixels, Tensor) and pixels.dim() == 2:
        pixels = pixels[None]
    if not isinstance(pixels, Tensor) or pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        kind = (
            f"{type(image).__name__} of shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        )
        raise DistillError(
            f"image {number}: expected a tensor (3, H, W), an array (H, W, 3), a PIL image or a path, got {kind}"
        )
    if pixels.is_floating_point():
        if not (float(pixels.min()) >= 0 and float(pixels.max()) <= 1):  # not so for NaN, either
            raise DistillError(f"image {number}: expected floats from 0 to 1, or uint8 from 0 to 255")
        pixels = (255 * pixels).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DistillError(f"image {number}: expected uint8 or floats from 0 to 1, got {pixels.dtype}")
    return pixels.cpu().expand(3, -1, -1)
