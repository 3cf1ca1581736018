"""Pascal VOC's average precision at one IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


class VocMetric(DetectionMetric):
    """AP of VOC: per class the area under the precision-recall curve; ``mAP``, its mean over the classes with objects.

    A detection, best first, is compared with the object of its image and class that it overlaps most (the first
    annotated at equal overlap). From ``iou`` on it is a true positive, once per object; a second one on the same object
    is a false positive, as is one below. Detections on difficult objects, and on crowds, count neither way. Equal
    scores rank by image id, then by the detector's order.

    Keys: ``mAP`` and, with ``per_class``, ``mAP/<name>``, in [0, 1]; -1 for a class without objects.

    Source: VOC development kit (``VOCevaldet.m``, ``VOCap.m``); Everingham et al. 2010, 10.1007/s11263-009-0275-4.
    The eleven points are multiples of 0.1 in floating point, as in the evaluators that published numbers come from: a
    recall of exactly 3/10 (6/10, 7/10) stays just below its point.

    Args:
        ground_truth, classes, seen_only: see :class:`DetectionMetric`.
        iou: overlap from which a detection is right.
        eleven_point: VOC2007's mean of the best precision at recall 0, 0.1, ..., 1, instead of the area.
        inclusive: boxes name their last pixel, so sides are one longer. Off where the data set is read with
            ``one_based``, which takes 1 off ``xmin`` and ``ymin`` only: its sides are already the development kit's
            ``xmax - xmin + 1``. On for raw VOC coordinates.
        per_class: add ``mAP/<name>`` for every class.
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

    def evaluate(self, truth: GroundTruth, found: DetectionArrays) -> dict[str, float]:
        """The numbers on arrays."""
        order = np.argsort(-found.score, kind="stable")
        found = DetectionArrays._make(column[order] for column in found)
        correct, counted = self._judge(truth, found)
        objects = ~(truth.difficult | truth.crowd)
        results = {}
        for label, name in enumerate(self.classes, start=1):
            hits = correct[counted & (found.label == label)]
            positives = int(np.count_nonzero(objects & (truth.label == label)))
            results[f"mAP/{name}"] = average_precision(hits, positives, self.eleven_point)
        measured = [value for value in results.values() if value >= 0]
        mean = {"mAP": float(np.mean(measured)) if measured else -1.0}
        return mean | results if self.per_class else mean

    def _judge(self, truth: GroundTruth, found: DetectionArrays) -> tuple[BoolArray, BoolArray]:
        """For detections best first: which are true positives, and which count at all."""
        objects, overlap = best_overlaps(truth, found, len(self.classes), self.inclusive)
        reached = np.flatnonzero(overlap >= self.iou)
        ignored = (truth.difficult | truth.crowd)[objects[reached]]
        counted = np.ones(len(found.score), dtype=np.bool_)
        counted[reached[ignored]] = False
        rivals = reached[~ignored]
        _, first = np.unique(objects[rivals], return_index=True)
        correct = np.zeros(len(found.score), dtype=np.bool_)
        correct[rivals[first]] = True
        return correct, counted


def average_precision(hits: BoolArray, positives: int, eleven_point: bool = False) -> float:
    """Area under the precision-recall curve, each precision the best at its recall or beyond; -1 without positives.

    Args:
        hits: (D,) whether each detection, best first, is a true positive.
        positives: number of objects to find.
        eleven_point: mean at recall 0, 0.1, ..., 1 instead of the area.
    """
    if positives == 0:
        return -1.0
    true = np.cumsum(hits)
    recall = true / positives
    precision = true / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_point:
        reached = np.searchsorted(recall, np.arange(11) * 0.1)
        return float(np.append(best, 0.0)[reached].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def best_overlaps(
    truth: GroundTruth, found: DetectionArrays, classes: int, inclusive: bool
) -> tuple[IntArray, FloatArray]:
    """For each detection (D,): the row of the object of its image and class with the highest IoU, and that IoU.

    -1 and 0 where the image has no object of that class.
    """
    key = np.searchsorted(truth.images, found.image) * (classes + 1) + found.label
    keys = np.searchsorted(truth.images, truth.image) * (classes + 1) + truth.label
    grouped = np.argsort(keys, kind="stable")
    start = np.searchsorted(keys[grouped], key, side="left")
    count = np.searchsorted(keys[grouped], key, side="right") - start
    detection = np.repeat(np.arange(len(key)), count)
    thing = grouped[concatenate_ranges(start, count)]
    iou = _pair_iou(found.box[detection], truth.box[thing], float(inclusive))
    order = np.lexsort((-iou, detection))
    having, first = np.unique(detection[order], return_index=True)
    objects, overlap = np.full(len(key), -1), np.zeros(len(key))
    objects[having] = thing[order[first]]
    overlap[having] = iou[order[first]]
    return objects, overlap


def _pair_iou(found: FloatArray, truth: FloatArray, extra: float) -> FloatArray:
    """IoU row by row: ``found`` (P, 4) xyxy, ``truth`` (P, 4) xywh, ``extra`` pixels added to every side."""
    last = truth[:, :2] + truth[:, 2:]
    sides = np.minimum(found[:, 2:], last) - np.maximum(found[:, :2], truth[:, :2]) + extra
    shared = sides.clip(min=0).prod(axis=1)
    areas = (found[:, 2:] - found[:, :2] + extra).prod(axis=1) + (truth[:, 2:] + extra).prod(axis=1)
    return np.asarray(shared / np.maximum(areas - shared, np.finfo(np.float64).tiny))
