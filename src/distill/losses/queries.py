"""Queries of two set-prediction detectors: which layers and which queries are compared, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import boxes as geometry
from distill.assignment import Matches, assign, box_costs, match_objects, set_targets
from distill.losses.base import require_equal_shapes
from distill.losses.heads import ClassMap
from distill.precision import upcast
from distill.types import Batch, QueryLayer, View

REMEDY = "Give both models the outputs of one kind of query"
Rows = tuple[Tensor, Tensor]
"""Indices of N queries of all images: the image (N,) and the query (N,)."""


def layer_pairs(
    student: Sequence[QueryLayer], teacher: Sequence[QueryLayer]
) -> Iterator[tuple[int, QueryLayer, int, QueryLayer]]:
    """The compared decoder layers, each with its index: the last with the last, then downwards.

    The first layers of the deeper decoder are left out. The papers compare decoders of equal depth; this order is our
    choice.
    """
    depth = min(len(student), len(teacher))
    for index in range(1, depth + 1):
        yield len(student) - index, student[-index], len(teacher) - index, teacher[-index]


class Predictions(NamedTuple):
    """Predictions of one layer in float32 at least, the teacher's in the student's classes and without a gradient."""

    logits: Tensor
    """(B, Q, K)."""
    boxes: Tensor
    """(B, Q, 4), in the form of `QueryLayer.boxes`."""

    def at(self, rows: Rows) -> Predictions:
        """(N, K) and (N, 4)."""
        return Predictions(self.logits[rows], self.boxes[rows])


def own(layer: QueryLayer) -> Predictions:
    """Predictions of the student."""
    return Predictions(upcast(layer.logits), upcast(layer.boxes))


def taught(layer: QueryLayer, classes: ClassMap) -> Predictions:
    """Predictions of the teacher."""
    return Predictions(upcast(classes.dense_logits(layer.logits.detach())), upcast(layer.boxes.detach()))


def clipped(predictions: Predictions, batch: Batch) -> Predictions:
    """The predictions with boxes clipped to their images, as DETRDistill's released code does with the teacher's."""
    height, width = batch.images.shape[-2:]
    sizes = torch.tensor(batch.sizes, dtype=predictions.boxes.dtype)
    right = (sizes[:, [1, 0, 1, 0]] / sizes.new_tensor([width, height, width, height]))[:, None]
    corners = geometry.corners(predictions.boxes)
    inside = corners.clamp(min=0).minimum(right.to(corners.device, non_blocking=True))
    cut = (inside != corners).any(-1, keepdim=True)  # the others keep their exact values
    return predictions._replace(boxes=torch.where(cut, geometry.shares(inside, 1, 1), predictions.boxes))


def taught_targets(teacher: View, classes: ClassMap) -> list[Matches]:
    """The teacher's matches of queries to objects, as `View.query_targets`, for labels of the student's classes.

    A teacher with another class list would read the labels as numbers of its own columns. Its columns are brought into
    the student's order before the matching.
    """
    if classes.columns is None:
        return teacher.query_targets
    layers = [layer._replace(logits=classes.dense_logits(layer.logits)) for layer in teacher.queries]
    return match_objects(layers, set_targets(teacher.batch))


def best(predictions: Predictions, top: int | None) -> Predictions:
    """The `top` queries of each image by their highest score; None for all."""
    if top is None or top >= predictions.logits.shape[1]:
        return predictions
    chosen = predictions.logits.amax(2).topk(top, dim=1).indices[..., None]
    logits = predictions.logits.gather(1, chosen.expand(-1, -1, predictions.logits.shape[2]))
    return Predictions(logits, predictions.boxes.gather(1, chosen.expand(-1, -1, 4)))


def match_cost(student: Predictions, teacher: Predictions) -> Tensor:
    """The cost of all pairs of the student's and the teacher's queries, (B, Q_s, Q_t).

    ::

        cost = sum_c [p_tjc BCE(z_ic, 1) + (1 - p_tjc) BCE(z_ic, 0)] + 5 |b_i - b_j|_1 - 2 GIoU(b_i, b_j)
    """
    require_equal_shapes("queries, class logits", student.logits[:, 0], teacher.logits[:, 0], REMEDY)
    p, z = teacher.logits.sigmoid(), student.logits
    classes = -(F.logsigmoid(z) @ p.mT + F.logsigmoid(-z) @ (1 - p).mT)
    return classes + box_costs(student.boxes, teacher.boxes)


@torch.no_grad()
def match_queries(pairs: Sequence[tuple[Predictions, Predictions]]) -> list[tuple[Rows, Rows]]:
    """Match the student's queries of each layer one-to-one to the teacher's, at the least cost of `match_cost`.

    Returns:
        for each layer the matched rows of the student and of the teacher, on the device.
    """
    if not pairs:
        return []
    costs = [match_cost(student, teacher) for student, teacher in pairs]
    device = costs[0].device
    matches = assign(costs, [costs[0].shape[2]] * len(costs[0]))
    return [rows_of(found, device) for found in matches]


def rows_of(matches: Matches, device: torch.device) -> tuple[Rows, Rows]:
    """The matches of all images as rows of both sides, with one copy to the device."""
    image = torch.cat([torch.full_like(rows, index) for index, (rows, _) in enumerate(matches)])
    stacked = torch.stack([image, *(torch.cat([pair[side].cpu() for pair in matches]) for side in (0, 1))])
    image, left, right = stacked.to(device, non_blocking=True).unbind()
    return (image, left), (image, right)


def matched_objects(matches: Matches, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objects of matched queries.

    Args:
        matches: as in `View.query_targets`, of one layer.
        batch: has the objects.
        like: gives dtype and device.

    Returns:
        the image, the query and the label from 0, (N,) int64 each as first, second and last; third, the objects' boxes
        (N, 4) as shares of the padded image.
    """
    (image, query), (_, target) = rows_of(matches, like.device)
    counts = [len(truth.labels) for truth in batch.targets]
    starts = torch.tensor([sum(counts[:index]) for index in range(len(counts))]).to(like.device, non_blocking=True)
    objects = starts[image] + target
    boxes = torch.cat([truth.boxes for truth in batch.targets])[objects].to(like)
    labels = torch.cat([truth.labels for truth in batch.targets])[objects] - 1
    return image, query, geometry.shares(boxes, *batch.images.shape[-2:]), labels


def distances(student: Predictions, teacher: Predictions) -> dict[str, Tensor]:
    """The distances of N paired predictions, each (N,).

    ::

        classes = sum_c BCE(z_s, sigmoid z_t)
        l1      = |b_s - b_t|_1
        giou    = 1 - GIoU(b_s, b_t)
    """
    require_equal_shapes("queries, class logits of pairs", student.logits, teacher.logits, REMEDY)
    classes = F.binary_cross_entropy_with_logits(student.logits, teacher.logits.sigmoid(), reduction="none")
    given, wanted = geometry.corners(student.boxes), geometry.corners(teacher.boxes)
    return {
        "classes": classes.sum(-1),
        "l1": (student.boxes - teacher.boxes).abs().sum(-1),
        "giou": 1 - geometry.paired_giou(given, wanted),
    }
