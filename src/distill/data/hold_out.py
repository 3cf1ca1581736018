"""Splits validation images off the training images, for data without a validation split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from distill.data.near_duplicates import Groups, group_similar
from distill.data.records import Records
from distill.imaging.decoding import MAX_PIXELS

ROBOFLOW_COPY = re.compile(r"(.+)\.rf\.[0-9A-Za-z]+")
"""Names of the copies that Roboflow makes of one image by augmentation."""


@dataclass(frozen=True)
class HeldOut:
    """The images that are split off for validation."""

    images: NDArray[np.bool_]
    """(N,) whether an image is for validation."""
    together: int
    """Number of images that stay with another one because they look alike."""
    by_name_alone: bool
    """Whether so many images look alike that their names alone decide."""

    def describe(self) -> str:
        """Describe how the images are chosen."""
        if self.by_name_alone:
            return "by a hash of their names: most images look alike, so that copies may be on both sides"
        kept = f"; {self.together} images stay on the same side as similar images" if self.together else ""
        return f"by a hash of their names{kept}"


def hold_out_images(
    files: Sequence[str], fraction: float, seed: int = 0, similar: bool = False, max_pixels: int = MAX_PIXELS
) -> HeldOut:
    """Choose images for validation.

    A hash of the file name decides, so the choice is the same on every machine, and added images change few choices. A
    name that occurs in several folders is hashed with as many of its folders as make it unique. The augmented copies of
    one image that Roboflow writes stay together, and with `similar` images that look alike. If this leaves less than
    half of the wanted part, since most images look alike, names alone decide.

    Args:
        files: paths of the images.
        fraction: part to choose. At least one group is chosen and one is not; of a single group nothing is chosen.
        seed: another seed gives another choice.
        similar: whether images that look alike stay together (`near_duplicates.group_similar`). Reads all files.
        max_pixels: larger images are not read.
    """
    names = _shorten_names([_remove_copy_mark(file) for file in files])
    groups = Groups(len(files))
    groups.join_equal(names)
    by_name = _choose_groups(names, groups.labels, fraction, seed)
    if not similar:
        return HeldOut(by_name, 0, False)
    name_sizes = groups.sizes()
    groups.join_equal(group_similar(files, max_pixels).tolist())
    chosen = _choose_groups(names, groups.labels, fraction, seed)
    if 2 * chosen.sum() < min(by_name.sum(), fraction * len(files)):
        return HeldOut(by_name, 0, True)
    return HeldOut(chosen, int((groups.sizes() > name_sizes).sum()), False)


def _choose_groups(names: Sequence[str], labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)
    groups = {min(names[index] for index in group): group for group in members.values()}
    salt = f"{seed}:" if seed else ""
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{salt}{name}".encode("utf-8", "surrogateescape")).digest())
    chosen = np.zeros(len(names), dtype=np.bool_)
    for name in order:
        if chosen.sum() + len(groups[name]) <= fraction * len(names):
            chosen[groups[name]] = True
    if not chosen.any() and len(groups) > 1:  # the fraction is smaller than any group
        chosen[groups[min(order, key=lambda name: len(groups[name]))]] = True
    return chosen


def _remove_copy_mark(file: str) -> str:
    """Return a path without its extension and without Roboflow's mark of augmented copies."""
    path = PurePath(file).with_suffix("")
    copy = ROBOFLOW_COPY.fullmatch(path.name)
    return (path.with_name(copy[1]) if copy else path).as_posix()


def _shorten_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest end of each path that no other path has, which does not change if the folder is moved."""
    short: dict[str, str] = {}
    rest, depth = list(dict.fromkeys(paths)), 1
    while rest:
        ends = {path: "/".join(path.split("/")[-depth:]) for path in rest}
        counts = Counter(ends.values())
        short |= {path: end for path, end in ends.items() if counts[end] == 1 or end == path}
        rest, depth = [path for path in rest if path not in short], depth + 1
    return [short[path] for path in paths]


def select_with_faults(records: Records, images: NDArray[np.bool_]) -> Records:
    """Return the images of a mask (N,) as their source read them, with their faults."""
    places = np.cumsum(images) - 1
    part = records.select(images)
    part.faults = {int(places[index]): list(faults) for index, faults in records.faults.items() if images[index]}
    return part
