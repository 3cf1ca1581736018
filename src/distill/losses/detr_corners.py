"""Localization distillation between two detectors with corner distributions (D-FINE, DEIM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill import boxes as geometry
from distill import distributed
from distill.assignment import Matches
from distill.losses import base, queries
from distill.losses.base import DistillLoss
from distill.losses.detr_points import require_equal_cells
from distill.losses.heads import ClassMap
from distill.losses.queries import Rows
from distill.precision import upcast
from distill.query_losses import balanced_mean, corner_divergence
from distill.types import Batch, DetectorSpec, DistillError, QueryLayer, View

CORNERS: dict[str, Any] = {"divergence": 1.5, "pairs": "points"}
PAIRS = ("points", "matching")


class _Compared(NamedTuple):
    """N pairs of queries of one layer."""

    values: Tensor
    """(N,) weighted divergences."""
    positive: Tensor
    """(N,) bool."""


class DETRCorners(DistillLoss):
    """Imitate the distributions of the four sides' offsets, query by query.

    ::

        corners.divergence = sum_l (sqrt(n_pos) mean_pos + sqrt(n_neg) mean_neg) / (sqrt(n_pos) + sqrt(n_neg))
        of  w T^2 KL(softmax(t / T) || softmax(s / T)),  averaged over the sides,  T = 5

    over decoder layers l and pairs of queries. ``pairs=points``: the student's decoder starts from the teacher's points
    (see :class:`distill.DETRPoints`), so query i is compared with query i; a pair is positive if the teacher's query
    is matched to an object. ``pairs=matching``: the student's own queries, matched as by :class:`distill.DETRLogits`; a
    pair is positive if the student's query is matched to an object. w is the IoU of the student's box with this object
    on positive pairs, and the teacher's highest score elsewhere. No gradient flows through w.

    Source: Peng et al., "D-FINE", 2024, arXiv 2410.13842: the form, T and the weight 1.5 are those of DDF, by which its
    layers imitate the last one. DDF across two models is our transfer, without a published number; for dense heads see
    Zheng et al., "Localization Distillation", CVPR 2022, arXiv 2102.12252.

    The distributions are of offsets from each model's own boxes of the first decoder layer, which may differ between
    the models.

    Shapes: corners (B, Q, 4, bins).

    Args:
        student, teacher: specs of two detectors with corner distributions of equal bins (number, limit, scale; D-FINE X
            has another scale than the smaller ones), for ``pairs=points`` also with equal strides of the encoders' maps
            (D-FINE N lacks stride 8). The teacher's losses must train the distributions (FGL, DDF), which those of the
            lite sizes of DEIMv2 do not. Such a student may learn: it has the distributions.
        corners: weight of its term ``divergence``; ``pairs``.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        corners: Mapping[str, Any] = CORNERS,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        options = base.merge_options("corners", corners, CORNERS)
        self_pairs = options.pop("pairs")
        if self_pairs not in PAIRS:
            raise DistillError(f"corners.pairs: expected {' or '.join(PAIRS)}, got '{self_pairs}'")
        super().__init__({"corners.divergence": options["divergence"]}, ramp, normalizer, seed)
        self.pairs = self_pairs
        if not self.weights:
            return
        base.require_outputs("corners", student, teacher, "queries", "query_targets")
        require_equal_bins("corners", student, teacher)
        if self.pairs == "points":
            require_equal_cells("corners", student, teacher, "Set corners.pairs=matching, which reads no cells. ")
        self.classes = ClassMap("corners", student, teacher)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        given = student.decode(teacher.query_points) if self.pairs == "points" else student.queries
        with torch.autocast(student.batch.images.device.type, enabled=False):
            compared = list(self._layers(given, student, teacher))
            counts = torch.stack([torch.stack([x.positive.sum(), (~x.positive).sum()]) for x in compared]).float()
            total, processes = distributed.sum_over_ranks(counts) if self.normalizer == "global" else (counts, 1)
            layers = [
                balanced_mean(x.values, x.positive, (positive, negative))
                for x, (positive, negative) in zip(compared, total, strict=True)
            ]
        return {"corners.divergence": processes * torch.stack(layers).sum()}

    def _layers(self, given: list[QueryLayer], student: View, teacher: View) -> Iterator[_Compared]:
        layers = list(queries.layer_pairs(given, teacher.queries))
        if self.pairs == "points":
            targets = queries.taught_targets(teacher, self.classes)
            for _, own, index, other in layers:
                every = torch.ones(other.logits.shape[:2], dtype=torch.bool, device=other.logits.device)
                image, query = every.nonzero(as_tuple=True)
                rows = image, query
                yield self._compare(own, other, rows, rows, targets[index], student.batch)
            return
        pairs = [
            (queries.own(own), queries.clipped(queries.taught(other, self.classes), student.batch))
            for _, own, _, other in layers
        ]
        for (index, own, _, other), (rows, columns) in zip(layers, queries.match_queries(pairs), strict=True):
            yield self._compare(own, other, rows, columns, student.query_targets[index], student.batch)

    def _compare(
        self, own: QueryLayer, other: QueryLayer, rows: Rows, columns: Rows, matches: Matches, batch: Batch
    ) -> _Compared:
        """Compare the student's queries `rows` with the teacher's `columns`; `matches` has the student's rows."""
        if own.corners is None or other.corners is None:
            raise DistillError("corners: expected corner distributions in every decoder layer, got None")
        boxes = upcast(own.boxes.detach())
        image, query, truth, _ = queries.matched_objects(matches, batch, boxes)
        quality = geometry.paired_iou(geometry.corners(boxes[image, query]), geometry.corners(truth))
        overlap = torch.zeros_like(boxes[..., 0]).index_put((image, query), quality)
        matched = torch.zeros_like(overlap, dtype=torch.bool).index_put((image, query), torch.ones_like(quality).bool())
        confidence = queries.taught(other, self.classes).logits.sigmoid().amax(-1)
        positive = matched[rows]
        weight = torch.where(positive, overlap[rows].to(confidence), confidence[columns])
        student_corners, teacher_corners = own.corners[rows], other.corners.detach()[columns]
        base.require_equal_shapes("corners of pairs", student_corners, teacher_corners, queries.REMEDY)
        return _Compared(weight * corner_divergence(upcast(student_corners), upcast(teacher_corners)), positive)


BIN_KEYS = {"count": "bins", "scale": "bin_curve"}
"""Entry of `DetectorSpec.corner_bins` -> the model's option that sets it."""


def require_equal_bins(name: str, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse detectors without corner distributions, teachers that do not train them, and bins of other offsets.

    Raises:
        DistillError: see above.
    """
    for role, spec in (("student", student), ("teacher", teacher)):
        if not spec.corner_bins:
            raise DistillError(
                f"{name}: the {role} is a {spec.family}, which has no corner distributions. Set the weights of {name} "
                "to 0, or choose a D-FINE (model=dfine_n)"
            )
    if not teacher.trains_corners:
        raise DistillError(
            f"{name}: the teacher is a {teacher.family} with corner_losses=false, as the sizes Pico, Femto and Atto of "
            "DEIMv2. Its losses train the mean of a distribution alone, so the distribution's form teaches nothing. "
            "Choose another teacher (teacher=deimv2_n), train this one with teacher.model.corner_losses=true, or set "
            f"the weights of {name} to 0"
        )
    differing = [key for key, value in student.corner_bins.items() if teacher.corner_bins[key] != value]
    if not differing:
        return
    values = [(BIN_KEYS.get(key, key), student.corner_bins[key], teacher.corner_bins[key]) for key in differing]
    # `count` is the number of bins; the option is the number of steps between them.
    values = [(key, own - (key == "bins"), other - (key == "bins")) for key, own, other in values]
    found = " and ".join(f"model.{key}={own} beside teacher.model.{key}={other}" for key, own, other in values)
    wanted = " ".join(f"teacher.model.{key}={own}" for key, own, _ in values)
    raise DistillError(
        f"{name}: expected equal bins of both models, got {found}. Train the teacher with the student's bins "
        f"({wanted}; published weights work only with the bins that they were trained with), choose another "
        f"teacher, or set the weights of {name} to 0"
    )
