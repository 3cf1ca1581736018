"""Size of the resized images and batch size, chosen from the training images and their objects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.data.records import Records

LARGEST = (800, 1333)
"""Shorter and longer side of the COCO papers, in pixels. Larger images are shrunk to this size."""
SMALL_OBJECT = 16.0
"""Side in pixels that most objects should have after the resize. Anchors and strides start at 8 to 32 pixels."""
MOST_ENLARGED = 2.0
"""Images are enlarged by this factor at most. More pixels add computing time, but no information."""
SQUARES = (288, 640)
"""Smallest and largest side of squares. 640 pixels are the papers' size. At 288 pixels, the map of stride 16 has 324
cells: enough for the 300 queries of RF-DETR and D-FINE N."""
SQUARE_STEP = 32
"""Sides of squares are multiples of the largest stride."""
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
    own = float(np.median(shorter))
    quarter, factor = _enlargement(records, own / shorter)
    min_size = round(min(own * factor, LARGEST[0]))
    aspect = min(max(float(np.quantile(longer / shorter, 0.95)), 4 / 3), 2.0)
    max_size = LARGEST[1] if min_size == LARGEST[0] else round(min_size * aspect)
    size = _median_size(records)
    if min_size == round(own):
        return SizeChoice(min_size, max_size, f"{size} keep their size")
    if min_size < own:
        return SizeChoice(min_size, max_size, f"{size} are shrunk")
    return SizeChoice(min_size, max_size, f"{size} are enlarged, {_reason(quarter)}")


def choose_square(records: Records) -> SizeChoice:
    """Choose the side of squares, for ``data.resize=square``: as many pixels as the images have, within limits.

    The side is the median square root of the images' areas. As in `choose_size`, it is enlarged if more than a quarter
    of the objects would be smaller than 16 px. It is rounded to a multiple of 32, from 288 to 640 px.

    Args:
        records: the checked training images, with their true sizes.
    """
    roots = np.sqrt(records.sizes.astype(np.float64).prod(axis=1))
    own = float(np.median(roots))
    quarter, factor = _enlargement(records, own / roots)
    side = round(own * factor / SQUARE_STEP) * SQUARE_STEP
    side = min(max(side, SQUARES[0]), SQUARES[1])
    enlarged = factor > 1 and side > own
    reason = f"{_median_size(records)} become squares" + (f" and are enlarged, {_reason(quarter)}" if enlarged else "")
    return SizeChoice(side, side, reason)


def _enlargement(records: Records, scales: NDArray[np.float64]) -> tuple[float, float]:
    """The first quartile of the objects' sizes in pixels, and the factor that enlarges it to `SMALL_OBJECT`.

    Args:
        records: the images and their objects.
        scales: (N,) the scale of each image's resize, before the enlargement.
    """
    objects = np.maximum(records.boxes, 0)
    areas = (objects[:, 2] - objects[:, 0]) * (objects[:, 3] - objects[:, 1])
    sides = np.sqrt(areas) * scales[records.row_images()]
    quarter = float(np.quantile(sides, 0.25)) if len(sides) else SMALL_OBJECT
    return quarter, min(max(1.0, SMALL_OBJECT / max(quarter, 1e-6)), MOST_ENLARGED)


def _median_size(records: Records) -> str:
    shorter, longer = np.median(np.sort(records.sizes, axis=1), axis=0)
    return f"images of {round(float(longer))}x{round(float(shorter))} px"


def _reason(quarter: float) -> str:
    return f"because a quarter of the objects is below {quarter:.0f} px"


def choose_batch(min_size: int, max_size: int) -> int:
    """Choose the training images per process and step, by the pixels of a resized image of aspect ratio 4:3.

    The choice does not depend on the machine, so that a run gives the same numbers on all machines.
    """
    side = (min_size * min(max_size, min_size * 4 / 3)) ** 0.5
    return next((batch for most, batch in BATCHES if side <= most), 2)
