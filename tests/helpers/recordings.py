"""Recordings of detections that no detector made."""

from __future__ import annotations

import numpy as np

from distill.evaluation.metric import DetectionArrays, GroundTruth
from distill.evaluation.recording import Recording

CLASSES = ("cat", "dog", "never")


def random_recording(seed: int, images: int = 12, crowds: bool = True) -> Recording:
    """Objects, and detections near them or anywhere. Some objects are crowds or difficult, some images are empty."""
    draw = np.random.default_rng(seed)
    objects = draw.integers(0, 5, images)
    image = np.repeat(np.arange(images) * 3 + 1, objects)
    box = np.concatenate([draw.uniform(0, 60, (len(image), 2)), draw.uniform(5, 40, (len(image), 2))], axis=1)
    label = draw.integers(1, 3, len(image))
    truth = GroundTruth(
        images=np.arange(images) * 3 + 1,
        image=image,
        label=label,
        box=box,
        area=box[:, 2] * box[:, 3],
        crowd=crowds & (draw.random(len(image)) < 0.1),
        difficult=crowds & (draw.random(len(image)) < 0.1),
        code=np.full(len(image), None, dtype=object),
    )
    rows = np.sort(draw.integers(0, len(image), 3 * len(image)))
    moved = box[rows] + draw.normal(0, 3, (len(rows), 4))
    corners = np.concatenate([moved[:, :2], moved[:, :2] + np.abs(moved[:, 2:])], axis=1)
    wrong = draw.random(len(rows)) < 0.2
    found = DetectionArrays(
        image=image[rows],
        label=np.where(wrong, 3 - label[rows], label[rows]),
        box=corners,
        score=draw.random(len(rows)),
        code=np.full(len(rows), None, dtype=object),
    )
    return Recording(CLASSES, truth, found)
