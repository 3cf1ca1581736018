"""The one-to-one assignment of queries to objects or to other queries, and its cost of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import boxes
from distill.precision import upcast
from distill.types import Batch, DistillError, QueryLayer

Matches = list[tuple[Tensor, Tensor]]
"""For each image the matched rows (N,) and their columns (N,), int64 on the CPU."""
L1_COST, GIOU_COST = 5.0, 2.0
COSTS = {"classification": 2.0, "l1": L1_COST, "giou": GIOU_COST}
"""Weights of the costs of a query and an object, those of RT-DETR and D-FINE."""
COST_FOCAL = 0.25, 2.0
"""alpha and gamma of the classification cost."""
HIGHEST = 1e12
"""Cost of a pair whose cost is not finite. It leaves float64 room for the differences of the other costs."""


class SetTarget(NamedTuple):
    """Ground truth of one image."""

    boxes: Tensor
    """(T, 4) in the form of `QueryLayer.boxes`."""
    labels: Tensor
    """(T,) int64, from 0."""


def set_targets(batch: Batch) -> list[SetTarget]:
    """Ground truth of a batch, as shares of the padded image, with labels from 0."""
    height, width = batch.images.shape[-2:]
    return [SetTarget(boxes.shares(target.boxes, height, width), target.labels - 1) for target in batch.targets]


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


def focal_costs(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """The classification cost of all pairs of queries and objects.

    ::

        cost = alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)),   p = sigmoid(z of the object's class)

    Source: the matcher of Deformable DETR (2010.04159) and RT-DETR (2304.08069), in their released code; alpha = 0.25,
    gamma = 2. The logarithms are exact here; the released code adds 1e-8 to their arguments.

    Args:
        logits: (B, Q, K).
        labels: (B, T), from 0.

    Returns:
        (B, Q, T).
    """
    z = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
    p = z.sigmoid()
    return alpha * (1 - p) ** gamma * -F.logsigmoid(z) - (1 - alpha) * p**gamma * -F.logsigmoid(-z)


@torch.no_grad()
def match_objects(
    layers: Sequence[QueryLayer],
    targets: Sequence[SetTarget],
    costs: Mapping[str, float] = COSTS,
    focal: tuple[float, float] = COST_FOCAL,
) -> list[Matches]:
    """Match each layer's queries to the objects, at the least total cost; see `assign`.

    With more objects than queries, every query is matched.

    Args:
        layers: their logits have one column for each class of the labels in `targets`.
        targets: ground truth of each image.
        costs: weights of `focal_costs` and of the two parts of `box_costs`.
        focal: alpha and gamma of `focal_costs`.
    """
    truth, labels = _padded(targets)
    matrices = []
    with torch.autocast(truth.device.type, enabled=False):
        for layer in layers:
            classes = focal_costs(upcast(layer.logits), labels, *focal)
            given = upcast(layer.boxes)
            distances = box_costs(given, truth.to(given), costs["l1"], costs["giou"])
            matrices.append(costs["classification"] * classes + distances)
    return assign(matrices, [len(target.labels) for target in targets])


def _padded(targets: Sequence[SetTarget]) -> tuple[Tensor, Tensor]:
    """Boxes (B, T, 4) and labels (B, T) of all images, padded with zeros."""
    truth = torch.nn.utils.rnn.pad_sequence([target.boxes for target in targets], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([target.labels for target in targets], batch_first=True)
    return truth, labels
