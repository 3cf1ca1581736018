"""Size of the resized images and batch size, chosen from the training images and their objects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distill.data.records import Records

LARGEST = (800, 1333)
"""Shorter and longer side of the COCO papers, in pixels. Larger images are shrunk to this size."""
SMALL_OBJECT = 16.0
"""Side in pixels that most objects should have after the resize. Anchors and strides start at 8 to 32 pixels."""
MOST_ENLARGED = 2.0
"""Images are enlarged by this factor at most. More pixels add computing time, but no information."""
BATCHES = ((400, 8), (640, 4))
"""Pairs (limit, batch size), for images whose square root of the area is up to the limit in pixels. Larger: 2."""


class SizeChoice(NamedTuple):
    """Chosen values of ``data.min_size``, ``data.max_size`` and the reason in words."""

    min_size: int
    max_size: int
    reason: str


def choose_size(records: Records) -> SizeChoice:
    """Choose the size of the resized images: that of the images themselves, within limits.

    The shorter side is the median shorter side of the images, 800 px at most. If more than a quarter of the objects
    would be smaller than 16 px (square root of the box area), it is enlarged until they are not: by a factor of 2 at
    most, and up to 800 px. The limit of the longer side is 1333 px if the shorter side is 800 px. Otherwise it fits the
    aspect ratio of 95 percent of the images, between 4:3 and 2:1.

    Args:
        records: the checked training images, with their true sizes.
    """
    shorter, longer = np.sort(records.sizes, axis=1).T.astype(np.float64)
    own, objects = float(np.median(shorter)), np.maximum(records.boxes, 0)
    scales = (own / shorter)[records.row_images()]  # of a resize to `own`
    sides = np.sqrt((objects[:, 2] - objects[:, 0]) * (objects[:, 3] - objects[:, 1])) * scales
    quarter = float(np.quantile(sides, 0.25)) if len(sides) else SMALL_OBJECT
    factor = min(max(1.0, SMALL_OBJECT / max(quarter, 1e-6)), MOST_ENLARGED)
    min_size = round(min(own * factor, LARGEST[0]))
    aspect = min(max(float(np.quantile(longer / shorter, 0.95)), 4 / 3), 2.0)
    max_size = LARGEST[1] if min_size == LARGEST[0] else round(min_size * aspect)
    size = f"images of {round(float(np.median(longer)))}x{round(own)} px"
    if min_size == round(own):
        return SizeChoice(min_size, max_size, f"{size} keep their size")
    if min_size < own:
        return SizeChoice(min_size, max_size, f"{size} are shrunk")
    return SizeChoice(
        min_size, max_size, f"{size} are enlarged, because a quarter of the objects is below {quarter:.0f} px"
    )


def choose_batch(min_size: int, max_size: int) -> int:
    """Choose the training images per process and step, by the pixels of a resized image of aspect ratio 4:3.

    The choice does not depend on the machine, so that a run gives the same numbers on all machines.
    """
    side = (min_size * min(max_size, min_size * 4 / 3)) ** 0.5
    return next((batch for most, batch in BATCHES if side <= most), 2)
