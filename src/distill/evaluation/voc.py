"""Pascal VOC's average precision at one IoU threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.evaluation.matching import average_precision, pair_iou
from distill.evaluation.metric import (
    BoolArray,
    DetectionArrays,
    DetectionMetric,
    FloatArray,
    GroundTruth,
    IntArray,
    concatenate_ranges,
)
from distill.types import DistillError

RECALLS_2007: FloatArray = np.arange(11, dtype=np.float64) * 0.1
"""The recalls of VOC2007's AP."""


class VocMetric(DetectionMetric):
    """VOC's AP: the area under the precision-recall curve of each class, and `mAP`, the mean over classes with objects.

    Detections are processed by descending score. Those with equal scores are ranked by image id, then in the detector's
    order. Each detection is compared with the object of its image and class that has the highest IoU with it; of
    objects with equal IoU, the one annotated first. If the IoU is at least `iou` and no earlier detection matched the
    object, the detection is a true positive. Otherwise it is a false positive. A detection that matches a difficult
    object or a crowd is neither.

    Keys: `mAP` and, with `per_class`, `mAP/<name>`, in [0, 1]; -1 for a class without objects.

    Source: VOC development kit (`VOCevaldet.m`, `VOCap.m`); Everingham et al. 2010, 10.1007/s11263-009-0275-4. The
    eleven recalls are multiples of 0.1 in floating point, as in the evaluators that published values come from. So a
    recall of exactly 3/10, 6/10 or 7/10 is just below its point.

    Args:
        ground_truth, classes, seen_only: see :class:`DetectionMetric`.
        iou: smallest IoU of a true positive, in (0, 1].
        eleven_point: whether AP is VOC2007's mean of the best precision at recall 0, 0.1, ..., 1, instead of the area.
        inclusive: whether corners include the last pixel, so that sides are longer by 1. Use True for raw VOC
            coordinates. Use False for data that is read with `one_based`, which subtracts 1 from `xmin` and `ymin`
            only: its sides already equal the development kit's `xmax - xmin + 1`.
        per_class: whether to add `mAP/<name>` for every class.

    Raises:
        DistillError: `iou` is not in (0, 1], or the ground truth is invalid.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        classes: Sequence[str],
        iou: float = 0.5,
        eleven_point: bool = False,
        inclusive: bool = False,
        per_class: bool = True,
        seen_only: bool = False,
    ) -> None:
        super().__init__(ground_truth, classes, seen_only)
        if not 0 < iou <= 1:
            raise DistillError(f"Expected an IoU in (0, 1] for VocMetric(iou=...), got {iou}.")
        self.iou = iou
        self.eleven_point = eleven_point
        self.inclusive = inclusive
        self.per_class = per_class

    def evaluate(self, truth: GroundTruth, detections: DetectionArrays) -> dict[str, float]:
        """Compute `mAP` and the AP of every class from arrays."""
        order = np.argsort(-detections.score, kind="stable")
        detections = DetectionArrays._make(column[order] for column in detections)
        correct, counted = self._match(truth, detections)
        objects = ~(truth.difficult | truth.crowd)
        results = {}
        for label, name in enumerate(self.classes, start=1):
            hits = correct[counted & (detections.label == label)]
            positives = int(np.count_nonzero(objects & (truth.label == label)))
            results[f"mAP/{name}"] = average_precision(hits, positives, RECALLS_2007 if self.eleven_point else None)
        measured = [value for value in results.values() if value >= 0]
        mean = {"mAP": float(np.mean(measured)) if measured else -1.0}
        return mean | results if self.per_class else mean

    def _match(self, truth: GroundTruth, detections: DetectionArrays) -> tuple[BoolArray, BoolArray]:
        """Return two masks (D,) of detections, sorted by descending score: true positives, and those that count."""
        objects, overlap = best_overlaps(truth, detections, len(self.classes), self.inclusive)
        reached = np.flatnonzero(overlap >= self.iou)
        ignored = (truth.difficult | truth.crowd)[objects[reached]]
        counted = np.ones(len(detections.score), dtype=np.bool_)
        counted[reached[ignored]] = False
        rivals = reached[~ignored]
        _, first = np.unique(objects[rivals], return_index=True)
        correct = np.zeros(len(detections.score), dtype=np.bool_)
        correct[rivals[first]] = True
        return correct, counted


def best_overlaps(
    truth: GroundTruth, detections: DetectionArrays, classes: int, inclusive: bool
) -> tuple[IntArray, FloatArray]:
    """Find the object of the same image and class with the highest IoU for each of D detections.

    Args:
        truth: the ground truth.
        detections: the detections.
        classes: number of classes.
        inclusive: whether corners include the last pixel.

    Returns:
        Two arrays (D,): the row of the object in `truth` and the IoU; -1 and 0 for a detection without such an object.
    """
    key = np.searchsorted(truth.images, detections.image) * (classes + 1) + detections.label
    keys = np.searchsorted(truth.images, truth.image) * (classes + 1) + truth.label
    grouped = np.argsort(keys, kind="stable")
    start = np.searchsorted(keys[grouped], key, side="left")
    count = np.searchsorted(keys[grouped], key, side="right") - start
    detection = np.repeat(np.arange(len(key)), count)
    candidate = grouped[concatenate_ranges(start, count)]
    iou = pair_iou(detections.box[detection], truth.box[candidate], float(inclusive))
    order = np.lexsort((-iou, detection))
    matched, first = np.unique(detection[order], return_index=True)
    objects, overlap = np.full(len(key), -1), np.zeros(len(key))
    objects[matched] = candidate[order[first]]
    overlap[matched] = iou[order[first]]
    return objects, overlap
