"""Matching of detections with the objects of their image by IoU, and average precision. Metrics and analyses use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distill.evaluation.metric import BoolArray, DetectionArrays, FloatArray, GroundTruth, IntArray

MAX_DETECTIONS = 100
"""Detections per image that count, the best ones: COCO's limit."""


class ImageRows(NamedTuple):
    """The rows of one image in `DetectionArrays` and `GroundTruth`, and the IoU of each pair."""

    image: int
    detections: IntArray
    """(D,) rows by descending score, at most `MAX_DETECTIONS`."""
    objects: IntArray
    """(N,) rows of objects that count."""
    ignored: IntArray
    """(M,) rows of crowds and difficult objects."""
    iou: FloatArray
    """(D, N) IoU with the objects that count."""


class Matches(NamedTuple):
    """Matches of D detections with N objects. A detection matches at most one object, and an object one detection."""

    counted: BoolArray
    """(D,) false for a detection that is neither right nor wrong: it lies in a crowd, matches a difficult object, or
    is not among the best `MAX_DETECTIONS` of its image."""
    matched: IntArray
    """(D,) row of the matched object, -1 for a detection without a match."""
    iou: FloatArray
    """(D,) IoU with the matched object, 0 without a match."""
    detection: IntArray
    """(N,) row of the matched detection, -1 for an object that no detection matches."""

    @property
    def correct(self) -> BoolArray:
        """(D,) whether each detection is a true positive."""
        return self.matched >= 0


def counted_objects(truth: GroundTruth) -> BoolArray:
    """Which of N objects count: those that are neither crowds nor difficult."""
    return ~(truth.crowd | truth.difficult)


def image_rows(truth: GroundTruth, detections: DetectionArrays) -> Iterator[ImageRows]:
    """Yield the rows of every image of the ground truth, by ascending image id.

    Detections with equal scores keep their order.
    """
    counts = counted_objects(truth)
    by_score = np.lexsort((np.arange(len(detections.score)), -detections.score, detections.image))
    by_image = np.argsort(truth.image, kind="stable")
    bounds = [
        np.searchsorted(column, truth.images, side)
        for column in (detections.image[by_score], truth.image[by_image])
        for side in ("left", "right")
    ]
    for image, first, end, first_object, end_object in zip(truth.images.tolist(), *bounds, strict=True):
        rows, objects = by_score[first:end][:MAX_DETECTIONS], by_image[first_object:end_object]
        own, ignored = objects[counts[objects]], objects[~counts[objects]]
        yield ImageRows(image, rows, own, ignored, pair_iou(detections.box[rows][:, None], truth.box[own][None]))


def match(truth: GroundTruth, detections: DetectionArrays, threshold: float = 0.5) -> Matches:
    """Match detections with objects of the same image and class, as COCO does at one IoU threshold.

    Detections choose by descending score. Each one takes the free object with the highest IoU, if the IoU is at least
    `threshold`. A detection without an object is not counted if it overlaps a crowd by more than `threshold` of its own
    area, or a difficult object with an IoU above `threshold`, of its class.

    Source: cocodataset.org/#detection-eval, with one limit of detections for all classes of an image.
    """
    counted = np.zeros(len(detections.score), dtype=np.bool_)
    matched, overlap = np.full(len(detections.score), -1), np.zeros(len(detections.score))
    partner = np.full(len(truth.image), -1)
    for rows in image_rows(truth, detections):
        counted[rows.detections] = True
        free = np.where(same_label(truth, detections, rows), rows.iou, 0.0)
        for place, detection in enumerate(rows.detections if rows.objects.size else ()):
            best = int(free[place].argmax())
            if free[place, best] >= threshold:
                matched[detection], overlap[detection] = rows.objects[best], free[place, best]
                partner[rows.objects[best]] = detection
                free[:, best] = 0
        if rows.ignored.size:
            others = rows.detections[matched[rows.detections] < 0]
            counted[others[_is_ignored(truth, detections, others, rows.ignored, threshold)]] = False
    return Matches(counted, matched, overlap, partner)


def same_label(truth: GroundTruth, detections: DetectionArrays, rows: ImageRows) -> BoolArray:
    """(D, N) whether detection and object of an image have the same class."""
    return np.asarray(detections.label[rows.detections][:, None] == truth.label[rows.objects][None])


def _is_ignored(
    truth: GroundTruth, detections: DetectionArrays, rows: IntArray, ignored: IntArray, threshold: float
) -> BoolArray:
    """Which of these detections overlap a crowd or a difficult object of their class."""
    boxes, regions = detections.box[rows][:, None], truth.box[ignored][None]
    overlap = np.where(truth.crowd[ignored], _covered_share(boxes, regions), pair_iou(boxes, regions))
    same = detections.label[rows][:, None] == truth.label[ignored][None]
    return np.asarray(((overlap > threshold) & same).any(1))


def pair_iou(detections: FloatArray, truth: FloatArray, extra: float = 0.0) -> FloatArray:
    """Return the IoU (...) of pairs of `detections` (..., 4) xyxy and `truth` (..., 4) xywh, which broadcast.

    `extra` is added to the length of all sides, in pixels.
    """
    shared = _intersection(detections, truth, extra)
    areas = (detections[..., 2:] - detections[..., :2] + extra).prod(axis=-1) + (truth[..., 2:] + extra).prod(axis=-1)
    return np.asarray(shared / np.maximum(areas - shared, np.finfo(np.float64).tiny))


def _covered_share(detections: FloatArray, truth: FloatArray) -> FloatArray:
    """Return the share of each detection's area that lies inside an object; boxes as in `pair_iou`."""
    areas = (detections[..., 2:] - detections[..., :2]).prod(axis=-1)
    return np.asarray(_intersection(detections, truth, 0.0) / np.maximum(areas, np.finfo(np.float64).tiny))


def _intersection(detections: FloatArray, truth: FloatArray, extra: float) -> FloatArray:
    last = truth[..., :2] + truth[..., 2:]
    sides = np.minimum(detections[..., 2:], last) - np.maximum(detections[..., :2], truth[..., :2]) + extra
    return np.asarray(sides.clip(min=0).prod(axis=-1))


def average_precision(hits: BoolArray, positives: int, recalls: FloatArray | None = None) -> float:
    """Compute the area under the precision-recall curve. It is -1 without positives.

    The precision at a recall is the highest precision at this recall or above.

    Args:
        hits: (D,) whether each detection is a true positive, by descending score.
        positives: number of objects.
        recalls: return the mean of the precision at these recalls instead of the area.
    """
    if positives == 0:
        return -1.0
    true_positives = np.cumsum(hits)
    recall = true_positives / positives
    precision = true_positives / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if recalls is not None:
        return float(np.append(best, 0.0)[np.searchsorted(recall, recalls)].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * best))
