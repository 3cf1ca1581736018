"""Masks and crops by loops over boxes, cells and samples, written from the equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slow_level(box: list[float], levels: int) -> int:
    x1, y1, x2, y2 = box
    s = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
    return min(max(math.floor(math.log2(s / 56 + 1e-6)), 0), levels - 1)


def slow_cells(box: list[float], stride: int, height: int, width: int) -> tuple[range, range, bool]:
    """Rows and columns that a box covers, and whether it is thinner than a cell."""
    a, b, c, d = (max(int(side / stride), 0) for side in box)
    c, d = min(c, width), min(d, height)
    if a >= c or b >= d:
        a, b = min(a, width - 1), min(b, height - 1)
        return range(b, b + 1), range(a, a + 1), True
    return range(b, d), range(a, c), False


def slow_masks(boxes: list[Tensor], grid: dict[int, tuple[int, int]], bump: bool = False) -> dict[int, Tensor]:
    masks = {stride: torch.zeros(len(boxes), *size) for stride, size in grid.items()}
    for image, image_boxes in enumerate(boxes):
        for box in image_boxes.tolist():
            stride = list(grid)[slow_level(box, len(grid))]
            rows, columns, thin = slow_cells(box, stride, *grid[stride])
            half_h, half_w = len(rows) / 2, len(columns) / 2
            for y, row in enumerate(rows):
                for x, column in enumerate(columns):
                    value = 1.0
                    if bump and not thin:
                        value = math.exp(-0.5 * ((x - half_w) / half_w) ** 2 - 0.5 * ((y - half_h) / half_h) ** 2)
                    masks[stride][image, row, column] = max(masks[stride][image, row, column].item(), value)
    return masks


def iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_fine_grained(
    boxes: list[Tensor], all_anchors: dict[int, Tensor], grid: dict[int, tuple[int, int]], psi: float
) -> dict[int, Tensor]:
    masks = {stride: torch.zeros(len(boxes), *size) for stride, size in grid.items()}
    for image, image_boxes in enumerate(boxes):
        for box in image_boxes.tolist():
            stride = list(grid)[slow_level(box, len(grid))]
            height, width = grid[stride]
            overlaps = [iou(anchor, box) for anchor in all_anchors[stride].tolist()]
            per_cell = len(overlaps) // (height * width)
            for index, overlap in enumerate(overlaps):
                if overlap > psi * max(overlaps):
                    cell = index // per_cell
                    masks[stride][image, cell // width, cell % width] = 1
    return masks


def slow_crop(image: Tensor, size: tuple[int, int], box: list[float], side: int) -> Tensor:
    """(C, H, W) -> (C, side, side), sample by sample; pixel (i, j) has its middle at (j + 1/2, i + 1/2)."""
    height, width = size
    x1, y1, x2, y2 = (min(max(v, 0.0), float(end)) for v, end in zip(box, (width, height) * 2, strict=True))
    out = torch.zeros(len(image), side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            x = min(max(x1 + (x2 - x1) * (j + 0.5) / side, 0.5), width - 0.5) - 0.5
            y = min(max(y1 + (y2 - y1) * (i + 0.5) / side, 0.5), height - 0.5) - 0.5
            left, top = math.floor(x), math.floor(y)
            for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
                    if down * across > 0:
                        out[:, i, j] += down * across * image[:, row, column].double()
    return out
