"""Consistent points: the student's decoder starts where the teacher's decoder starts, so that queries form pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill import boxes as geometry
from distill.assignment import Matches, match_objects, set_targets
from distill.losses import base, queries
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.query_losses import varifocal_loss
from distill.types import Batch, DetectorSpec, DistillError, QueryLayer, View

POINTS = {"classes": 2.0, "l1": 5.0, "giou": 2.0}
ASSIGNMENT = {"classes": 0.0, "l1": 0.0, "giou": 0.0}
ASSIGNERS = ("teacher", "student")
VFL = (0.75, 2.0)


class DETRPoints(DistillLoss):
    """Run the student's decoder from the teacher's cells and start boxes, and compare query with query.

    ::

        points.classes      = sum_l 1/W_l sum_i w_i sum_c BCE(z_ic, sigmoid of the teacher's z_ic)
        points.l1           = sum_l 1/W_l sum_i w_i |b_i - b_i'|_1
        points.giou         = sum_l 1/W_l sum_i w_i (1 - GIoU(b_i, b_i'))
        assignment.classes  = sum_l 1/N_l VFL of all these queries, with the targets of the matches
        assignment.l1       = sum_l 1/N_l sum over the matches  |b_i - g|_1
        assignment.giou     = sum_l 1/N_l sum over the matches  1 - GIoU(b_i, g)

    over decoder layers l and the queries i of the additional pass. w_i is the teacher's highest score in the layer, W_l
    the sum of w_i. g is the object to which query i is matched in the layer (see `assigned_by`), N_l the
    number of matches.

    Source of ``points``: Wang, Fan, Zheng, Liu, Wang, Sun, "KD-DETR: Knowledge Distillation for Detection Transformer
    with Consistent Distillation Points Sampling", CVPR 2024, arXiv 2211.08071 (its specific points; the weights, 2, 5
    and 2, are from memory; the divisor W_l is our choice), and Chen, Chen, Wu, "D3ETR", 2022, arXiv 2211.09768, fixed
    matching. Source of ``assignment``: DETRDistill, ICCV 2023, arXiv 2211.10156, query-prior assignment: its released
    code adds the teacher's learned queries as a second group. It computes the teacher's matches, but does not pass
    them on, and matches the student's boxes of this group itself: ``assigned_by="student"``. Two-stage detectors have
    no learned queries; their points are cells of the encoder's maps.

    Where we differ: KD-DETR's general points, drawn at random, are not implemented. Counts are summed over all
    processes. Decoders of different depth are compared from the last layer downwards.

    Shapes: logits (B, Q, K), boxes (B, Q, 4). COCO (KD-DETR): DAB-DETR R18 36.2 -> 41.4. The additional pass costs a
    decoder, not a backbone.

    Args:
        student, teacher: specs of two set-prediction detectors with equal strides of their encoders' maps: the
            teacher's cells must be cells of the student.
        points: weights of the terms that compare with the teacher.
        assignment: weights of the terms that compare with the ground truth; 0 by default. The student's own losses have
            the weights 1, 5 and 2.
        assigned_by: the matches of ``assignment``: those of the ``teacher``'s queries, or those of the ``student``'s
            outputs of the additional pass.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        points: Mapping[str, float] = POINTS,
        assignment: Mapping[str, float] = ASSIGNMENT,
        assigned_by: str = "teacher",
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        places = {
            "points": base.merge_options("points", points, POINTS),
            "assignment": base.merge_options("assignment", assignment, ASSIGNMENT),
        }
        weights = {f"{place}.{name}": weight for place, terms in places.items() for name, weight in terms.items()}
        super().__init__(weights, ramp, normalizer, seed)
        if assigned_by not in ASSIGNERS:
            raise DistillError(f"assigned_by: expected {' or '.join(ASSIGNERS)}, got '{assigned_by}'")
        self.assigned_by = assigned_by
        if self.weights:
            require_equal_cells("points", student, teacher)
            self.classes = ClassMap("points", student, teacher)
            if self.terms("assignment"):
                base.require_outputs("assignment", student, teacher, "query_targets")

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [name for name in self.weights if name.startswith("assignment.")]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        decoded = student.decode(teacher.query_points)
        own = self.assigned_by == "student"
        assigned = self._matches(decoded, student, teacher) if self.terms("assignment") else []
        with torch.autocast(student.batch.images.device.type, enabled=False):
            for layer, given, index, target in queries.layer_pairs(decoded, teacher.queries):
                values = self._imitate(given, target) if self.terms("points") else {}
                if self.terms("assignment"):
                    values |= assigned_losses(given, assigned[layer if own else index], student.batch)
                for term, share in values.items():
                    if term in shares:
                        shares[term].append(share)
        return self.average({term: base.summed(layers) for term, layers in shares.items()})

    def _matches(self, decoded: list[QueryLayer], student: View, teacher: View) -> list[Matches]:
        """For each decoder layer of the student or of the teacher."""
        if self.assigned_by == "teacher":
            return queries.taught_targets(teacher, self.classes)
        return match_objects(decoded, set_targets(student.batch))

    def _imitate(self, given: QueryLayer, target: QueryLayer) -> dict[str, SumAndCount]:
        teacher = queries.taught(target, self.classes)
        weight = teacher.logits.sigmoid().amax(-1)
        values = queries.distances(queries.own(given), teacher)
        return {f"points.{name}": ((weight * value).sum(), weight.sum()) for name, value in values.items()}


def assigned_losses(layer: QueryLayer, matches: Matches, batch: Batch) -> dict[str, SumAndCount]:
    """The terms ``assignment.*`` of a student's layer with given matches."""
    logits, boxes = queries.own(layer)
    image, query, truth, labels = queries.matched_objects(matches, batch, boxes)
    given = boxes[image, query]
    corners, wanted = geometry.corners(given), geometry.corners(truth)
    quality = geometry.paired_iou(corners, wanted).detach()
    places = image, query, labels
    soft = torch.zeros_like(logits).index_put(places, quality.to(logits))
    positive = torch.zeros_like(logits, dtype=torch.bool).index_put(places, torch.ones_like(quality).bool())
    values = {
        "classes": varifocal_loss(logits, soft, positive, *VFL),
        "l1": (given - truth).abs().sum(),
        "giou": (1 - geometry.paired_giou(corners, wanted)).sum(),
    }
    return {f"assignment.{name}": base.sum_and_size(value, len(query)) for name, value in values.items()}


def require_equal_cells(name: str, student: DetectorSpec, teacher: DetectorSpec, remedy: str = "") -> None:
    """Refuse a pair whose decoders cannot start from the same cells. The message gives the remedy first.

    Raises:
        DistillError: a detector has no queries, or the strides of the encoders' maps differ.
    """
    base.require_outputs(name, student, teacher, "queries", "query_points", "decode")
    if list(student.neck) != list(teacher.neck):
        raise DistillError(
            f"{name}: expected encoders with maps of equal strides, because the student's decoder starts from the "
            f"teacher's cells; got model.strides={list(student.neck)} and teacher.model.strides={list(teacher.neck)}. "
            f"{remedy}Choose a teacher with the student's strides, or set the weights of {name} to 0"
        )
