"""Boxes compared row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def paired_iou(boxes: Tensor, truth: Tensor) -> Tensor:
    """IoU of each box with the box in the same row, both (R, 4) -> (R,); 0 where neither has an area."""
    overlap, union = _overlap_and_union(boxes, truth)
    return overlap / union.clamp(min=torch.finfo(boxes.dtype).tiny)


def paired_giou(boxes: Tensor, truth: Tensor) -> Tensor:
    """Generalized IoU of each box with the box in the same row, both (R, 4) -> (R,), in [-1, 1].

    torchvision's loss selects rows by a mask, for which the host would wait for the device.
    """
    tiny = torch.finfo(boxes.dtype).tiny
    overlap, union = _overlap_and_union(boxes, truth)
    low, high = torch.minimum(boxes[:, :2], truth[:, :2]), torch.maximum(boxes[:, 2:], truth[:, 2:])
    hull = (high - low).clamp(min=0).prod(1)
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _overlap_and_union(boxes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (R,)."""
    low, high = torch.maximum(boxes[:, :2], truth[:, :2]), torch.minimum(boxes[:, 2:], truth[:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) + (truth[:, 2:] - truth[:, :2]).clamp(min=0).prod(1)
    return overlap, areas - overlap
