"""DETRDistill, part 1: the student's queries imitate the teacher's queries to which they are matched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distill.losses import base, queries
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.losses.queries import Predictions
from distill.types import Batch, DetectorSpec, DistillError, QueryLayer, View

QUERIES: dict[str, Any] = {"classes": 1.0, "l1": 5.0, "giou": 2.0, "top": None}


class DETRLogits(DistillLoss):
    """Imitate class scores and boxes of the teacher's queries in each decoder layer, matched by a Hungarian assignment.

    ::

        cost(i, j)       = sum_c [p_jc BCE(z_ic, 1) + (1 - p_jc) BCE(z_ic, 0)] + 5 |b_i - b_j|_1 - 2 GIoU(b_i, b_j)
        queries.classes  = sum_l 1/N_l sum over pairs  sum_c BCE(z_ic, p_jc)         p = sigmoid of the teacher's logits
        queries.l1       = sum_l 1/N_l sum over pairs  |b_i - b_j|_1
        queries.giou     = sum_l 1/N_l sum over pairs  1 - GIoU(b_i, b_j)

    over decoder layers l and the pairs of the student's query i with the teacher's query j, whose box b_j is clipped to
    the image. N_l is the number of pairs.

    Source: Chang, Wang, Cai, Dou, Zheng, Wu, "DETRDistill: A Universal Knowledge Distillation Framework for
    DETR-families", ICCV 2023, arXiv 2211.10156, Hungarian-matching logits distillation. The cost, the weights,
    the clipped boxes, and that all queries of the teacher take part with weight 1, are those of its released code.

    Where we differ: N_l is counted over all processes. Decoders of different depth are compared from the last layer
    downwards (`queries.layer_pairs`). The boxes are shares of the padded image.

    Shapes: logits (B, Q, K), boxes (B, Q, 4). Published weights: 1, 5, 2. COCO: Deformable DETR R101 44.8, R50 44.1 ->
    46.6 with all three parts of the method. The assignment runs on the CPU, once per layer and image: with 300 by 300
    queries it takes milliseconds each; ``top`` makes it cheaper.

    Args:
        student, teacher: specs of two set-prediction detectors. The teacher may know more classes.
        queries: weights of its terms; ``top``: the number of the teacher's queries that take part, those of the highest
            scores, None for all.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        queries: Mapping[str, Any] = QUERIES,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        options = base.merge_options("queries", queries, QUERIES)
        top = options.pop("top")
        if top is not None and not (isinstance(top, int) and top > 0):
            raise DistillError(f"queries.top: expected a number of queries from 1, or null for all, got {top!r}")
        super().__init__({f"queries.{name}": weight for name, weight in options.items()}, ramp, normalizer, seed)
        self.top: int | None = top
        if self.weights:
            base.require_outputs("queries", student, teacher, "queries")
            self.classes = ClassMap("queries", student, teacher)

    def forward(self, student: View, teacher: View) -> dict[str, torch.Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        with torch.autocast(student.batch.images.device.type, enabled=False):
            layers = queries.layer_pairs(student.queries, teacher.queries)
            pairs = [(queries.own(given), self._targets(target, student.batch)) for _, given, _, target in layers]
            for (given, target), (rows, columns) in zip(pairs, queries.match_queries(pairs), strict=True):
                for name, values in queries.distances(given.at(rows), target.at(columns)).items():
                    if f"queries.{name}" in shares:
                        shares[f"queries.{name}"].append(base.sum_and_size(values.sum(), len(values)))
        return self.average({term: base.summed(layers) for term, layers in shares.items()})

    def _targets(self, layer: QueryLayer, batch: Batch) -> Predictions:
        best = queries.best(queries.taught(layer, self.classes), self.top)
        return queries.clipped(best, batch)
