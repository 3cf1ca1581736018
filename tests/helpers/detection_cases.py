"""Objects and detections as arrays, drawn at random or written by hand, for analyses of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.evaluation.metric import DetectionArrays, GroundTruth, parse_ground_truth

Row = tuple[int, int, Sequence[float]]
"""Image id, label, box xyxy."""


def arrays(
    classes: Sequence[str],
    images: Sequence[int],
    objects: Sequence[Row],
    detections: Sequence[tuple[int, int, Sequence[float], float]],
    crowds: Sequence[Row] = (),
    difficult: Sequence[Row] = (),
) -> tuple[GroundTruth, DetectionArrays]:
    """Ground truth and detections; a detection also has a score. Detections are sorted by image as metrics do."""
    annotations = [
        {
            "image_id": image,
            "category_id": label,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "iscrowd": int(kind == "crowd"),
            "difficult": int(kind == "difficult"),
        }
        for kind, rows in (("", objects), ("crowd", crowds), ("difficult", difficult))
        for image, label, box in rows
    ]
    content: dict[str, Any] = {
        "images": [{"id": image} for image in images],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes, start=1)],
    }
    rows = sorted(detections, key=lambda row: row[0])
    found = DetectionArrays(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row[3] for row in rows], dtype=np.float64),
        np.full(len(rows), None, dtype=object),
    )
    return parse_ground_truth(content, classes), found


def random_case(seed: int, classes: Sequence[str], images: int = 20) -> tuple[GroundTruth, DetectionArrays]:
    """Objects, crowds, and detections with errors of every kind. All scores differ."""
    rng = np.random.default_rng(seed)
    objects: list[Row] = []
    crowds: list[Row] = []
    detections: list[tuple[int, int, Sequence[float], float]] = []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 7)):
            label = int(rng.integers(1, len(classes) + 1))
            corner, side = rng.uniform(0, 300, 2), rng.uniform(20, 120, 2)
            box = np.round([*corner, *(corner + side)], 2)
            (crowds if rng.random() < 0.1 else objects).append((image, label, box.tolist()))
            for _ in range(rng.integers(0, 4)):
                moved = np.round(box + rng.normal(0, rng.choice([1, 6, 25]), 4), 2)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                given = label if rng.random() < 0.7 else int(rng.integers(1, len(classes) + 1))
                detections.append((image, given, moved.tolist(), 0.0))
        for _ in range(rng.integers(0, 3)):
            corner, side = rng.uniform(0, 300, 2), rng.uniform(20, 120, 2)
            box = np.round([*corner, *(corner + side)], 2)
            detections.append((image, int(rng.integers(1, len(classes) + 1)), box.tolist(), 0.0))
    scores = (rng.permutation(len(detections)) + 0.5) / len(detections)
    scored = [(*row[:3], float(score)) for row, score in zip(detections, scores, strict=True)]
    return arrays(classes, range(1, images + 1), objects, scored, crowds)
