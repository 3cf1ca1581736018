"""Agreement of a student with its teacher, and the images where only the teacher is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distill.evaluation.matching import counted_objects, match
from distill.evaluation.metric import BoolArray, DetectionArrays, GroundTruth, IntArray


class Agreement(NamedTuple):
    """How far a student agrees with its teacher. The detections of both are confident ones. -1 divides nothing."""

    boxes: int
    """Number of the teacher's boxes."""
    found: float
    """Share of the teacher's boxes that the student finds: same class, IoU of at least 0.5."""
    right_found: float
    """The same share of the teacher's true positives."""
    mistakes: int
    """Number of the teacher's false positives."""
    copied: float
    """Share of the teacher's false positives that the student finds, too."""
    missed: int
    """Number of objects that the teacher misses."""
    missed_too: float
    """Share of them that the student misses, too."""


def agreement(truth: GroundTruth, teacher: DetectionArrays, student: DetectionArrays, iou: float = 0.5) -> Agreement:
    """Compare a student's confident detections with those of its teacher.

    Args:
        truth: the ground truth.
        teacher, student: confident detections, see `thresholds.confident`. A false positive in a crowd is no mistake.
        iou: smallest IoU of two boxes that agree.
    """
    own, other = match(truth, teacher, iou), match(truth, student, iou)
    found = match(as_truth(truth, teacher), student, iou).detection >= 0
    wrong = own.counted & ~own.correct
    lost = counted_objects(truth) & (own.detection < 0)
    return Agreement(
        len(teacher.score),
        _share(found, np.ones(len(found), dtype=np.bool_)),
        _share(found, own.correct),
        int(wrong.sum()),
        _share(found, wrong),
        int(lost.sum()),
        _share(other.detection < 0, lost),
    )


def as_truth(truth: GroundTruth, detections: DetectionArrays) -> GroundTruth:
    """Take detections as the ground truth of the same images, for a comparison of two detectors."""
    corners, none = detections.box, np.zeros(len(detections.score), dtype=np.bool_)
    box = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return GroundTruth(
        truth.images, detections.image, detections.label, box, box[:, 2] * box[:, 3], none, none, detections.code
    )


class ToDo(NamedTuple):
    """An image in which the teacher is right and the student is wrong."""

    image: int
    lost: int
    """Objects that the teacher finds and the student misses."""
    invented: int
    """False positives of the student that the teacher does not have."""
    gained: int
    """Objects that the student finds and the teacher misses."""

    @property
    def errors(self) -> int:
        """Number of the student's errors that the teacher does not make."""
        return self.lost + self.invented


def to_do_list(truth: GroundTruth, teacher: DetectionArrays, student: DetectionArrays, iou: float = 0.5) -> list[ToDo]:
    """Rank the images by the number of the student's errors that the teacher does not make.

    Images without such errors are left out. Of equal ones, those with more lost objects come first, then those with
    smaller ids. Arguments as in `agreement`.
    """
    own, other = match(truth, teacher, iou), match(truth, student, iou)
    shared = match(as_truth(truth, teacher), student, iou).correct
    invented = other.counted & ~other.correct & ~shared
    by_teacher, by_student = own.detection >= 0, other.detection >= 0
    images = truth.images
    lost = _count(images, truth.image[by_teacher & ~by_student])
    gained = _count(images, truth.image[by_student & ~by_teacher])
    rows = zip(images.tolist(), lost, _count(images, student.image[invented]), gained, strict=True)
    listed = [row for row in (ToDo(*values) for values in rows) if row.errors]
    return sorted(listed, key=lambda row: (-row.errors, -row.lost, row.image))


def _count(images: IntArray, places: IntArray) -> list[int]:
    """Number of rows of each image, from the image ids of the rows."""
    counts: list[int] = np.bincount(np.searchsorted(images, places), minlength=len(images)).tolist()
    return counts


def _share(member: BoolArray, among: BoolArray) -> float:
    total = int(among.sum())
    return float((member & among).sum() / total) if total else -1.0
