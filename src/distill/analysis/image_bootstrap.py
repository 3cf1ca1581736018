"""How much of a difference in AP is chance of the test images: a bootstrap over images, paired between two models.

Which detection matches which object depends on its image alone. So the matches are computed once, and a resample of
images changes only how often each image counts: AP of a resample is a weighted sum over the same matches, and equals AP
of a data set that holds each image so many times.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.analysis.statistics import Interval
from distill.evaluation.coco import detection_rows, ground_truth_rows
from distill.evaluation.metric import BoolArray, FloatArray, IntArray
from distill.evaluation.recording import Recording

RESAMPLES = 1000
RECALLS = np.linspace(0.0, 1.0, 101)
CHUNK = 4_000_000
"""Largest number of elements of a table that is computed at once."""


class ClassMatches(NamedTuple):
    """Matches of one class. Detections (D) are sorted by descending score; there are I images and T IoU thresholds."""

    objects: IntArray
    """(I,) number of objects that count."""
    image: IntArray
    """(D,) index of the image of each detection."""
    correct: BoolArray
    """(T, D) whether a detection matches an object that counts."""
    counted: BoolArray
    """(T, D) whether a detection counts. One that matches a crowd or a difficult object does not."""


def match_detections(recording: Recording) -> list[ClassMatches]:
    """COCO's matches of all classes at IoU 0.5, 0.55, ..., 0.95, by pycocotools.

    At most 100 detections per image and class count, as in COCO's AP. Detections of equal score are in the order of
    their image ids.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = recording.truth, recording.detections
    frame = {
        "images": [{"id": image} for image in truth.images.tolist()],
        "categories": [{"id": label, "name": name} for label, name in enumerate(recording.classes, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        datasets = []
        for annotations in (ground_truth_rows(truth), detection_rows(found)):
            dataset = COCO()
            dataset.dataset = {**frame, "annotations": annotations}
            dataset.createIndex()
            datasets.append(dataset)
        evaluation = COCOeval(*datasets, iouType="bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    images = len(truth.images)
    parts = evaluation.evalImgs  # by class, then by image
    return [
        _collect(parts[number * images : (number + 1) * images], images) for number in range(len(frame["categories"]))
    ]


def _collect(parts: Sequence[dict[str, Any] | None], images: int) -> ClassMatches:
    """The matches of one class from the entries of pycocotools, one an image; None without objects and detections."""
    objects = np.zeros(images, dtype=np.int64)
    index: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    scores: list[FloatArray] = [np.zeros(0)]
    matched: list[BoolArray] = [np.zeros((10, 0), dtype=np.bool_)]
    ignored: list[BoolArray] = [np.zeros((10, 0), dtype=np.bool_)]
    for image, part in enumerate(parts):
        if part is None:
            continue
        objects[image] = np.count_nonzero(np.asarray(part["gtIgnore"]) == 0)
        scores.append(np.asarray(part["dtScores"], dtype=np.float64))
        index.append(np.full(len(part["dtScores"]), image, dtype=np.int64))
        matched.append(np.asarray(part["dtMatches"]) > 0)
        ignored.append(np.asarray(part["dtIgnore"]).astype(np.bool_))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    counted = ~np.concatenate(ignored, axis=1)[:, order]
    correct = np.concatenate(matched, axis=1)[:, order] & counted
    return ClassMatches(objects, np.concatenate(index)[order], correct, counted)


def resampled_ap(classes: Sequence[ClassMatches], weights: IntArray) -> FloatArray:
    """COCO's AP of resampled data sets: the mean over IoU thresholds, recalls, and the classes that have objects.

    Args:
        classes: the matches of each class.
        weights: (B, I) how often each image counts in each of B resamples.

    Returns:
        (B,) AP from 0 to 1; -1 for a resample without objects.
    """
    total, measured = np.zeros(len(weights)), np.zeros(len(weights), dtype=np.int64)
    for one in classes:
        objects = weights @ one.objects
        size = max(1, CHUNK // max(1, len(one.image), len(RECALLS)))
        for start in range(0, len(weights), size):
            rows = slice(start, start + size)
            total[rows] += np.where(objects[rows] > 0, _class_ap(one, weights[rows], objects[rows]), 0.0)
        measured += objects > 0
    return np.where(measured > 0, total / np.maximum(measured, 1), -1.0)


def _class_ap(one: ClassMatches, weights: IntArray, objects: IntArray) -> FloatArray:
    """(B,) AP of one class; of no meaning where there are no objects."""
    times = weights[:, one.image]
    seen = np.cumsum(times, axis=1) if one.counted.all() else None
    wanted = _least_hits(objects)
    values = np.zeros(len(weights))
    for correct, counted in zip(one.correct, one.counted, strict=True):
        hits = np.flatnonzero(correct)
        if not len(hits):
            continue
        found = np.cumsum(times[:, hits], axis=1)
        counts = np.cumsum(times * counted, axis=1) if seen is None else seen
        # Precision falls between two hits, so its maximum over higher recalls is that over the hits.
        precision = found / np.maximum(counts[:, hits], 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        values += _at_recalls(best, found, wanted)
    return values / len(one.correct)


def _least_hits(objects: IntArray) -> IntArray:
    """(B, 101) the least number of hits whose recall, as a float, reaches each of COCO's recalls."""
    total = np.maximum(objects, 1)[:, None]
    least = np.floor(RECALLS * total).astype(np.int64)
    for _ in range(2):  # the rounding of a product and of a quotient
        least += least / total < RECALLS
    return least


def _at_recalls(best: FloatArray, found: IntArray, wanted: IntArray) -> FloatArray:
    """(B,) mean over the recalls of the precision `best` (B, H) at the first hit with `found` >= `wanted`, else 0."""
    resamples, hits = best.shape
    # One search in the rows one after another: an offset makes each row larger than the one before.
    offset = (np.arange(resamples) * (int(max(found.max(), wanted.max())) + 1))[:, None]
    first = np.searchsorted((found + offset).ravel(), (wanted + offset).ravel()).reshape(wanted.shape)
    first -= (np.arange(resamples) * hits)[:, None]
    padded = np.concatenate([best, np.zeros((resamples, 1))], axis=1)
    return np.asarray(np.take_along_axis(padded, np.minimum(first, hits), axis=1).mean(axis=1))


def bootstrap_ap(recording: Recording, resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """AP on all images, and on resamples of the images.

    A resample draws as many images as there are, with replacement. Recordings with the same ground truth and the same
    `seed` get the same draws, so that their values can be subtracted.

    Returns:
        (1 + resamples,): AP of all images first; -1 where no object was drawn.
    """
    images = len(recording.truth.images)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / max(1, images)), size=resamples)
    weights = np.concatenate([np.ones((1, images), dtype=np.int64), draws.astype(np.int64)])
    return resampled_ap(match_detections(recording), weights)


def difference_interval(model: FloatArray, baseline: FloatArray, confidence: float = 0.95) -> Interval | None:
    """The difference of two models' AP with its percentile interval over resampled images.

    The interval covers the choice of the test images only. It says nothing about the seed of the training.

    Args:
        model, baseline: what `bootstrap_ap` returned for both, with the same ground truth and seed.
        confidence: of the interval.

    Returns:
        None without objects.
    """
    measured = (model >= 0) & (baseline >= 0)
    differences = (model - baseline)[1:][measured[1:]]
    if not measured[0] or not len(differences):
        return None
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(model[0] - baseline[0]), float(low), float(high))
