"""The one-to-one assignment of queries to objects or to other queries, and its cost of boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill import boxes
from distill.types import DistillError

Matches = list[tuple[Tensor, Tensor]]
"""For each image the matched rows (N,) and their columns (N,), int64 on the CPU."""
L1_COST, GIOU_COST = 5.0, 2.0
HIGHEST = 1e12
"""Cost of a pair whose cost is not finite. It leaves float64 room for the differences of the other costs."""


def box_costs(rows: Tensor, columns: Tensor, l1: float = L1_COST, giou: float = GIOU_COST) -> Tensor:
    """``l1 |b - b'|_1 - giou GIoU(b, b')`` of all pairs; boxes (..., Q, 4) and (..., T, 4) -> (..., Q, T).

    The boxes are (center x, center y, width, height). The weights 5 and 2 are those of DETR and its successors.
    """
    left, right = rows[..., :, None, :], columns[..., None, :, :]
    distance = (left - right).abs().sum(-1)
    return l1 * distance - giou * boxes.paired_giou(boxes.corners(left), boxes.corners(right))


def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> list[Matches]:
    """Assign rows to columns one-to-one, with the least total cost in each image (Hungarian method).

    All costs are copied to the host together: the device is waited for once.

    Args:
        costs: one tensor (B, Q, T) per result. A cost that is not finite is the highest cost.
        counts: number of columns of each image that take part; the other columns are padding.

    Returns:
        one result per cost tensor; each image has min(Q, count) matches, sorted by row.

    Raises:
        DistillError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise DistillError(
            "scipy is not installed, and the matching of queries needs it: pip install 'distill[detr]', or uv pip "
            "install 'distill[detr]'"
        ) from error
    if not costs:
        return []
    flat = torch.cat([cost.detach().double().flatten() for cost in costs]).cpu()
    flat = flat.nan_to_num(nan=HIGHEST, posinf=HIGHEST, neginf=HIGHEST)
    parts = torch.split(flat, [cost.numel() for cost in costs])
    results = []
    for cost, part in zip(costs, parts, strict=True):
        images = zip(part.view(cost.shape).numpy(), counts, strict=True)
        pairs = [linear_sum_assignment(image[:, :count]) for image, count in images]
        results.append([(torch.from_numpy(rows), torch.from_numpy(columns)) for rows, columns in pairs])
    return results
