"""Crops of images at boxes, with a gradient that flows through the sampling grid to the corners of the boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.types import Size


def crops(images: Tensor, sizes: Sequence[Size], boxes: Tensor, owner: Tensor, side: int) -> Tensor:
    """Crop boxes, clamped to their images, by ``side`` x ``side`` bilinear samples at the centers of a regular grid.

    This is the crop of a spatial transformer (Jaderberg et al. 2015) with an affine grid and unaligned corners, with
    one difference: a sample within half a pixel of the image's edge takes the edge's value and nothing of the padding.
    RoIAlign does not fit: torchvision's passes a gradient to the images but none to the boxes, and a loss on predicted
    boxes needs the latter.

    Args:
        images: (B, C, H, W).
        sizes: (height, width) of each image without its padding.
        boxes: (R, 4), xyxy in pixels.
        owner: (R,) index of each box's image.
        side: side of a crop, in pixels.

    Returns:
        (R, C, side, side), in the dtype of ``images``.
    """
    count, channels, height, width = images.shape
    ends = torch.tensor([(w, h) for h, w in sizes], dtype=images.dtype).to(images.device, non_blocking=True)[owner]
    low, high = (corner.to(images.dtype).clamp(min=0).minimum(ends) for corner in (boxes[:, :2], boxes[:, 2:]))
    fractions = (torch.arange(side, device=images.device, dtype=images.dtype)[:, None] + 0.5) / side
    points = low[:, None] + (high - low)[:, None] * fractions  # (R, side, 2)
    x, y = points.clamp(min=0.5).minimum(ends[:, None] - 0.5).unbind(2)
    # All images are stacked vertically into one tall image, so that one call samples the boxes of all of them.
    y = y + owner[:, None] * height
    across = (2 * x / width - 1)[:, None, :].expand(-1, side, -1)
    down = (2 * y / (count * height) - 1)[:, :, None].expand(-1, -1, side)
    grid = torch.stack([across, down], dim=3).view(1, -1, side, 2)
    tall = images.transpose(0, 1).reshape(1, channels, count * height, width)
    samples = F.grid_sample(tall, grid, padding_mode="border", align_corners=False)
    return samples.view(channels, -1, side, side).transpose(0, 1)
