"""Advice about data that is valid, but trains badly."""

from __future__ import annotations

import numpy as np

from distill.data.datamodule import DetectionData

FEW_IMAGES = 10
"""A class in fewer training images is hardly learned."""
ENLARGED = 1.5
"""Images that are enlarged by more than this factor per side cost time without need."""
NAMED = 5
"""Largest number of classes that a message names."""


def training_advice(data: DetectionData, size_is_chosen: bool = False) -> list[str]:
    """Return sentences about enlarged images, and about classes with few or no training images.

    Args:
        data: the data, already read.
        size_is_chosen: whether the size was ``auto``, where an enlargement has a reason.
    """
    records = data.training_records("train")
    own = np.median(records.sizes, axis=0)
    resized = data.eval_transform.fit((round(own[0]), round(own[1])))
    factor = resized[0] / own[0]
    advice = []
    if factor > ENLARGED and not size_is_chosen:
        advice.append(
            f"images of {own[1]:.0f}x{own[0]:.0f} px are enlarged to {resized[1]}x{resized[0]} px, {factor**2:.0f} "
            "times the pixels, which costs time: data.min_size=auto data.max_size=auto choose a size from the data"
        )
    rows = ~records.crowd
    pairs = np.unique(np.stack([records.row_images()[rows], records.labels[rows]]), axis=1)
    counts = np.bincount(pairs[1], minlength=len(data.classes) + 1)[1:]
    without = [name for name, count in zip(data.classes, counts.tolist(), strict=True) if not count]
    few = [
        f"{name} ({count})" for name, count in zip(data.classes, counts.tolist(), strict=True) if 0 < count < FEW_IMAGES
    ]
    if without:
        advice.append(
            f"no training image has a box of {_listed(without)}: the model cannot learn these classes. Leave them out "
            "with data.source.classes"
        )
    if few:
        advice.append(f"fewer than {FEW_IMAGES} training images have a box of {_listed(few)}: expect a low AP there")
    return advice


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
