"""Calibration: whether a score of 0.8 means that 80 % of such detections are right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distill.evaluation.matching import Matches, match
from distill.evaluation.metric import BoolArray, DetectionArrays, FloatArray, GroundTruth, IntArray

BINS = 25


class Reliability(NamedTuple):
    """Detections in bins of equal width by score. All arrays are (`BINS`,); an empty bin has zeros."""

    counts: IntArray
    score: FloatArray
    """Mean score."""
    precision: FloatArray
    """Share of true positives."""
    iou: FloatArray
    """Mean IoU of the true positives with their objects."""

    @property
    def d_ece(self) -> float:
        """Sum over bins of |D_j| / |D| times |score_j - precision_j|; -1 without detections."""
        return self._error(self.precision)

    @property
    def la_ece(self) -> float:
        """Sum over bins of |D_j| / |D| times |score_j - precision_j IoU_j|; -1 without detections."""
        return self._error(self.precision * self.iou)

    def _error(self, target: FloatArray) -> float:
        total = self.counts.sum()
        return float((self.counts * np.abs(self.score - target)).sum() / total) if total else -1.0


class Calibration(NamedTuple):
    """Calibration of one detector."""

    d_ece: float
    """Detection expected calibration error, in [0, 1]; -1 without detections."""
    la_ece: float
    """Localization-aware expected calibration error: mean over classes with detections; -1 without any."""
    all: Reliability
    by_class: list[Reliability]
    """One entry per class."""


def calibration(truth: GroundTruth, detections: DetectionArrays, classes: int, iou: float = 0.5) -> Calibration:
    """Measure the calibration of all detections that count.

    A detection is right if it matches an object of its class as in COCO. D-ECE compares the scores with the precision,
    over all classes together. LaECE compares them with precision times mean IoU, so a score should also say how well a
    box fits, and averages over the classes.

    Sources: D-ECE with the score alone: Kueppers, Kronenberger, Shantia, Haselhoff, "Multivariate Confidence
    Calibration for Object Detection", CVPR Workshops 2020, arXiv 2004.13546. LaECE and the 25 bins: Oksuz, Joy,
    Dokania, "Towards Building Self-Aware Object Detectors via Reliable Uncertainty Quantification and Calibration",
    CVPR 2023, arXiv 2307.00934.

    Args:
        truth, detections: of one data set. The detector's own score limit decides which detections there are.
        classes: number of classes.
        iou: smallest IoU of a true positive.
    """
    matches = match(truth, detections, iou)
    overall = _reliability(detections, matches, matches.counted)
    by_class = [
        _reliability(detections, matches, matches.counted & (detections.label == label))
        for label in range(1, classes + 1)
    ]
    measured = [part.la_ece for part in by_class if part.counts.any()]
    return Calibration(overall.d_ece, float(np.mean(measured)) if measured else -1.0, overall, by_class)


def _reliability(detections: DetectionArrays, matches: Matches, chosen: BoolArray) -> Reliability:
    score, correct, iou = detections.score[chosen], matches.correct[chosen], matches.iou[chosen]
    place = np.clip(np.ceil(score * BINS).astype(np.int64) - 1, 0, BINS - 1)  # bins (j / 25, (j + 1) / 25]
    count, right = np.bincount(place, minlength=BINS), np.bincount(place[correct], minlength=BINS)
    sums = np.bincount(place, score, BINS), np.bincount(place[correct], iou[correct], BINS)
    return Reliability(
        count, sums[0] / np.maximum(count, 1), right / np.maximum(count, 1), sums[1] / np.maximum(right, 1)
    )
