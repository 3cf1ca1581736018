"""Boxes compared row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def paired_iou(boxes: Tensor, truth: Tensor) -> Tensor:
    """IoU of each box with the box in the same row, both (R, 4) -> (R,); 0 where neither has an area."""
    low, high = torch.maximum(boxes[:, :2], truth[:, :2]), torch.minimum(boxes[:, 2:], truth[:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) + (truth[:, 2:] - truth[:, :2]).clamp(min=0).prod(1)
    return overlap / (areas - overlap).clamp(min=torch.finfo(boxes.dtype).tiny)
