"""Splits validation images off the training images, for data without a validation split."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from distill.data.records import Records

ROBOFLOW_COPY = re.compile(r"(.+)\.rf\.[0-9A-Za-z]+")
"""Names of the copies that Roboflow makes of one image by augmentation."""


def hold_out_images(files: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """Return a mask (N,) of the images chosen for validation.

    A hash of the file name decides, so the choice is the same on every machine, and added images change few choices.
    The augmented copies of one image that Roboflow writes stay together, and so do images of one name.

    Args:
        files: paths of the images.
        fraction: part to choose. At least one group is chosen and one is not; of a single group nothing is chosen.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, file in enumerate(files):
        stem = PurePath(file).stem
        copy = ROBOFLOW_COPY.fullmatch(stem)
        groups[copy[1] if copy else stem].append(index)
    chosen = np.zeros(len(files), dtype=np.bool_)
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    for name in order:
        if chosen.sum() + len(groups[name]) <= fraction * len(files):
            chosen[groups[name]] = True
    if not chosen.any() and len(groups) > 1:  # the fraction is smaller than any group
        chosen[groups[min(order, key=lambda name: len(groups[name]))]] = True
    return chosen


def select_with_faults(records: Records, images: NDArray[np.bool_]) -> Records:
    """Return the images of a mask (N,) as their source read them, with their faults."""
    places = np.cumsum(images) - 1
    part = records.select(images)
    part.faults = {int(places[index]): list(faults) for index, faults in records.faults.items() if images[index]}
    return part
