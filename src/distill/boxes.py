"""Boxes compared row by row, and the form of boxes of set-prediction detectors."""

from __future__ import annotations

import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) as (center x, center y, width, height) -> (x1, y1, x2, y2). A negative side counts as 0."""
    center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([center - half, center + half], dim=-1)


def shares(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (..., 4) in pixels -> (center x, center y, width, height) as shares of an image's width and height."""
    size = boxes.new_tensor([width, height, width, height])
    scaled = boxes / size
    low, high = scaled[..., :2], scaled[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def paired_iou(boxes: Tensor, truth: Tensor) -> Tensor:
    """IoU of each box with the box in the same row, both (..., 4) -> (...); 0 where neither has an area."""
    overlap, union = _overlap_and_union(boxes, truth)
    return overlap / union.clamp(min=torch.finfo(boxes.dtype).tiny)


def paired_giou(boxes: Tensor, truth: Tensor) -> Tensor:
    """Generalized IoU of each box with the box in the same row, both (..., 4) -> (...), in [-1, 1].

    torchvision's loss selects rows by a mask, for which the host would wait for the device.
    """
    tiny = torch.finfo(boxes.dtype).tiny
    overlap, union = _overlap_and_union(boxes, truth)
    low, high = torch.minimum(boxes[..., :2], truth[..., :2]), torch.maximum(boxes[..., 2:], truth[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _overlap_and_union(boxes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...)."""
    low, high = torch.maximum(boxes[..., :2], truth[..., :2]), torch.minimum(boxes[..., 2:], truth[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) + (truth[..., 2:] - truth[..., :2]).clamp(
        min=0
    ).prod(-1)
    return overlap, areas - overlap
