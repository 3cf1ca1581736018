"""Precision, recall and F1 over the score threshold of each class, the best thresholds, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill.evaluation.matching import Matches, counted_objects, image_rows, match
from distill.evaluation.metric import BoolArray, DetectionArrays, FloatArray, GroundTruth, IntArray

ALL = "all classes"
"""Name of the curve of all classes together, with one threshold for all."""
NONE = "background"
"""Name of the last row and column of a confusion matrix."""


class Curve(NamedTuple):
    """Precision, recall and F1 of the detections from each score on, by descending score. All arrays are (T,)."""

    objects: int
    score: FloatArray
    precision: FloatArray
    recall: FloatArray
    f1: FloatArray

    @property
    def best(self) -> int | None:
        """Index of the best F1; the highest score among equal ones. None without a true positive."""
        return int(self.f1.argmax()) if self.f1.size and self.f1.max() > 0 else None

    @property
    def threshold(self) -> float | None:
        """The score at the best F1. None without a true positive."""
        return None if self.best is None else float(self.score[self.best])


def threshold_curves(
    truth: GroundTruth, detections: DetectionArrays, classes: Sequence[str], iou: float = 0.5
) -> dict[str, Curve]:
    """Compute the curve of each class, and of all classes together (`ALL`).

    Precision is the share of true positives among the detections with at least this score, recall the share of objects
    that they find, and F1 their harmonic mean, 2 TP / (detections + objects). Equal scores are one point.

    Args:
        truth, detections: of one data set.
        classes: the K class names.
        iou: smallest IoU of a true positive.
    """
    matches, expected = match(truth, detections, iou), counted_objects(truth)
    every = np.ones(len(detections.score), dtype=np.bool_)
    curves = {ALL: _curve(detections.score, matches, every, int(expected.sum()))}
    for label, name in enumerate(classes, start=1):
        objects = int(np.count_nonzero(expected & (truth.label == label)))
        curves[name] = _curve(detections.score, matches, detections.label == label, objects)
    return curves


def _curve(scores: FloatArray, matches: Matches, chosen: BoolArray, objects: int) -> Curve:
    rows = np.flatnonzero(chosen & matches.counted)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    score, found = scores[rows], np.cumsum(matches.correct[rows])
    last = np.flatnonzero(np.diff(score, append=-np.inf))  # the last row of each score
    number, found = last + 1, found[last]
    recall = found / objects if objects else np.zeros(len(last))
    return Curve(objects, score[last], found / number, recall, 2 * found / (number + objects))


def confident(
    detections: DetectionArrays, curves: Mapping[str, Curve], classes: Sequence[str], fallback: float = 0.5
) -> DetectionArrays:
    """Keep the detections with at least the best threshold of their class.

    Args:
        detections: the detections.
        curves: of the same detector.
        classes: the K class names.
        fallback: threshold of a class without a true positive.
    """
    thresholds = [curves[name].threshold for name in classes]
    limits = np.array([np.inf, *(fallback if value is None else value for value in thresholds)])
    return select(detections, detections.score >= limits[detections.label])


def select(detections: DetectionArrays, kept: BoolArray) -> DetectionArrays:
    """Keep some rows of the detections."""
    return DetectionArrays._make(column[kept] for column in detections)


def confusion_matrix(truth: GroundTruth, detections: DetectionArrays, classes: int, iou: float = 0.5) -> IntArray:
    """Count the pairs of the object's class (row) and the detection's class (column), (K + 1, K + 1).

    True positives are matched first. The other detections then choose by descending score: each takes the free object
    of another class with the highest IoU, from `iou` on. The last row has the detections without an object, the last
    column the objects without a detection. Detections in crowds and of difficult objects are left out.

    Args:
        truth: the ground truth.
        detections: the confident detections only.
        classes: number of classes K.
        iou: smallest IoU of a match.
    """
    matches = match(truth, detections, iou)
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for rows in image_rows(truth, detections):
        partner = dict(zip(matches.detection[rows.objects].tolist(), rows.objects.tolist(), strict=True))
        partner.pop(-1, None)
        free = rows.iou.copy()
        free[:, matches.detection[rows.objects] >= 0] = 0
        for place, detection in enumerate(rows.detections.tolist()):
            if detection in partner or not rows.objects.size or not matches.counted[detection]:
                continue
            best = int(free[place].argmax())
            if free[place, best] >= iou:
                partner[detection] = int(rows.objects[best])
                free[:, best] = 0
        for detection in rows.detections[matches.counted[rows.detections]].tolist():
            row = truth.label[partner[detection]] - 1 if detection in partner else classes
            counts[row, detections.label[detection] - 1] += 1
        for missed in set(rows.objects.tolist()) - set(partner.values()):
            counts[truth.label[missed] - 1, classes] += 1
    return counts
