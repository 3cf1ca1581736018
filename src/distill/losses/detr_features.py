"""DETRDistill, part 2: imitate the neck where the teacher's queries look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import boxes as geometry
from distill.losses import base
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import NeckPairs, squared_error
from distill.precision import upcast
from distill.types import Batch, DetectorSpec, DistillError, QueryLayer, View, require

ADAPTER = {"kernel": "auto", "start": "default", "relu": False}
NECK: dict[str, Any] = {"features": 1.0, "levels": None}
LEAST = 0.01
"""Least value of a mask before it is divided by its maximum, in the released code."""


@torch.no_grad()
def query_qualities(layer: QueryLayer, batch: Batch, top: int) -> tuple[Tensor, Tensor]:
    """The best (query, class) pairs of the teacher in each image, and their quality.

    Args:
        layer: outputs of the teacher's layer.
        batch: has the objects.
        top: number of pairs; all if there are fewer.

    Returns:
        (B, top) int64 queries, which may repeat, and (B, top) qualities: score times the highest IoU of the query's box
        with an object, or the score alone in an image without objects, or whose objects are not known.
    """
    scores = upcast(layer.logits).sigmoid().flatten(1)
    score, place = scores.topk(min(top, scores.shape[1]), dim=1)
    query = place // layer.logits.shape[2]
    if batch.targets_missing:
        return query, score
    chosen = geometry.corners(upcast(layer.boxes).gather(1, query[..., None].expand(-1, -1, 4)))
    qualities = []
    for image, target in enumerate(batch.targets):
        truth = geometry.corners(geometry.shares(target.boxes.to(chosen), *batch.images.shape[-2:]))
        overlap = geometry.paired_iou(chosen[image][:, None], truth[None])
        qualities.append(score[image] * overlap.amax(1) if len(truth) else score[image])
    return query, torch.stack(qualities)


@torch.no_grad()
def target_mask(features: Tensor, hidden: Tensor, quality: Tensor) -> Tensor:
    """``m = max(sum_n q_n cos(h_n, T(cell)), 0.01)``, divided by its maximum in the image.

    Args:
        features: T, (B, C, H, W).
        hidden: h, (B, N, C).
        quality: q, (B, N).

    Returns:
        (B, H, W).
    """
    cells, states = F.normalize(features, dim=1), F.normalize(hidden, dim=2)
    # The sum over n first: the cosine is linear in the normalized query.
    mask = torch.einsum("bnc,bn,bchw->bhw", states, quality, cells).clamp(min=LEAST)
    return mask / mask.amax((1, 2), keepdim=True)


class DETRFeatures(DistillLoss):
    """Imitate the teacher's neck, weighted by the similarity of its cells to the teacher's good queries.

    ::

        neck.features = sum over layers l and levels  mean (m T - m S)^2
        m = max(sum_n q_n cos(h_n, T(cell)), 0.01) / (its maximum in the image)

    over the 100 best (query, class) pairs n of the teacher's layer: h_n is the query's hidden state, q_n the score
    times the highest IoU of the query's box with an object (the score alone in an image without objects).

    Source: Chang et al., "DETRDistill", ICCV 2023, arXiv 2211.10156, target-aware feature distillation; the number 100,
    the least value 0.01, the sums and the weight 1 are those of its released code.

    Where we differ: the student may be any detector with a neck, at the strides that both necks share. A convolution
    adapts the student's channels where they differ.

    Shapes: maps (B, C, H, W), hidden states (B, Q, C). Published weight: 1.

    Args:
        student: spec of a detector with a neck.
        teacher: spec of a set-prediction detector. Its hidden states must have the channels of its neck: RT-DETR R101
            and D-FINE X, with 256 and 384, cannot teach.
        neck: weight of its term; ``levels``: strides, or a number of the finest shared levels, None for all.
        top: number of (query, class) pairs.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        top: int = 100,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({"neck.features": neck["features"]}, ramp, normalizer, seed)
        if not (isinstance(top, int) and top > 0):
            raise DistillError(f"top: expected a number of queries from 1, got {top!r}")
        self.top = top
        self.neck: NeckPairs | None = None
        if self.weights:
            require(teacher, "queries", "neck", "teacher", "Choose another distill option for this teacher")
            options = base.merge_options("adapter", adapter, ADAPTER)
            self.neck = NeckPairs(student, teacher, neck["levels"], options, seed)
            if teacher.query_channels is not None:
                for level in self.neck.levels:
                    require_equal_channels(teacher.query_channels, teacher.neck[level])

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if self.neck is None:
            return {}
        pairs = self.neck(student, teacher)
        shares: list[SumAndCount] = []
        with torch.autocast(student.batch.images.device.type, enabled=False):
            for layer in teacher.queries:
                query, quality = query_qualities(layer, student.batch, self.top)
                hidden = upcast(layer.hidden.detach())
                states = hidden.gather(1, query[..., None].expand(-1, -1, hidden.shape[2]))
                for student_map, teacher_map in pairs:
                    require_equal_channels(states.shape[2], teacher_map.shape[1])
                    mask = target_mask(teacher_map, states, quality)
                    error = squared_error(mask[:, None] * student_map, mask[:, None] * teacher_map)
                    shares.append(base.sum_and_size(error.sum(), teacher_map.numel()))
        return self.average({"neck.features": base.summed(shares)})


def require_equal_channels(states: int, neck: int) -> None:
    """Refuse a teacher whose hidden states and maps cannot be compared.

    Args:
        states: channels of the hidden states.
        neck: channels of a map.

    Raises:
        DistillError: the numbers differ.
    """
    if states != neck:
        raise DistillError(
            "neck: expected a teacher whose hidden states have as many channels as its neck, got "
            f"teacher.model.decoder_channels={states} and teacher.model.neck_channels={neck}. Choose another teacher "
            "(teacher=rtdetr_r50, teacher=dfine_l), or a method that reads the neck alone (distill=pkd)"
        )
