"""The detections of two programs in the same images, compared as sets: equal scores may come in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.types import Detections

PIXELS = 1.0
"""Largest difference of a coordinate in a pair of equal detections, in pixels of the original image."""
SCORE = 0.01
"""Largest difference of scores in a pair."""


@dataclass(frozen=True)
class Parity:
    """How far the detections of a file are from those of the student."""

    images: int
    detections: int
    """Detections of the student."""
    surplus: int
    """Detections of the file without an equal detection of the student."""
    missing: int
    """Detections of the student without an equal detection of the file."""
    pixels: float
    """Largest difference of a coordinate among the pairs, in pixels of the original image."""
    score: float
    """Largest difference of scores among the pairs."""
    mask_pixels: float
    """Largest share of an image's pixels in which two masks of a pair differ; 0 without masks."""

    @property
    def agreement(self) -> float:
        """Pairs / (pairs + surplus + missing), from 0 to 1."""
        pairs = self.detections - self.missing
        total = pairs + self.surplus + self.missing
        return pairs / total if total else 1.0


def compare_detections(student: Sequence[Detections], exported: Sequence[Detections]) -> Parity:
    """Pair the detections of each image. A detection pairs with the nearest free one of its label, best scores first.

    Args:
        student: detections of the student, one entry per image, on the CPU.
        exported: those of the file, for the same images.
    """
    surplus = missing = 0
    pixels = score = masks = 0.0
    for ours, found in zip(student, exported, strict=True):
        free = set(range(len(found.scores)))
        for index in range(len(ours.scores)):
            same = [place for place in free if found.labels[place] == ours.labels[index]]
            distance = [
                max(
                    float((found.boxes[place] - ours.boxes[index]).abs().max()) / PIXELS,
                    float((found.scores[place] - ours.scores[index]).abs()) / SCORE,
                )
                for place in same
            ]
            if not distance or min(distance) > 1:
                missing += 1
                continue
            place = same[distance.index(min(distance))]
            free.remove(place)
            pixels = max(pixels, float((found.boxes[place] - ours.boxes[index]).abs().max()))
            score = max(score, float((found.scores[place] - ours.scores[index]).abs()))
            if ours.masks is not None and found.masks is not None:
                masks = max(masks, float((found.masks[place] != ours.masks[index]).float().mean()))
        surplus += len(free)
    return Parity(len(student), sum(len(image.scores) for image in student), surplus, missing, pixels, score, masks)
