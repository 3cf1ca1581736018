"""Groups of images that look alike: copies that were compressed or resized again, and frames of one video.

An image is described by 128 bits. The image is shrunk to 9x9 gray values. A bit says whether a value is greater than
its left neighbor, or than its upper neighbor (difference hash, N. Krawetz, 2013). Two images look alike if at most
`MAX_DISTANCE` bits differ, or `MAX_SEQUENCE_DISTANCE` for two images that follow each other in the order of their
names, such as `frame_0007` and `frame_0008`. Images with few set bits are nearly plain. Their limit is lower.

Measured on BCCD and on images of COCO: unrelated images differ in 35 bits or more.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.data.column_cache import cache_file, load_columns, save_columns
from distill.data.inspection import MIN_CACHED_FILES, map_chunks, read_states

SIDE = 8
"""Comparisons per row and per column."""
BYTES = 2 * SIDE * SIDE // 8
"""Bytes of a description. Two images that differ in at most `MAX_DISTANCE` bits have one byte in common."""
MAX_DISTANCE = BYTES - 1
MAX_SEQUENCE_DISTANCE = 28
MIN_SHARE, MIN_SEQUENCE_SHARE = 4, 2
"""At most one bit in this number of the bits that are set in either image may differ."""
ROWS = 256
"""Images that are compared with all others of their byte at a time."""
CACHE_VERSION = 1
"""Raise this number if the same files get other labels."""


class Groups:
    """A partition of N items, at first into groups of one."""

    def __init__(self, count: int) -> None:
        self.labels: NDArray[np.int64] = np.arange(count)
        """(N,) items of one group have the same label, the smallest index of the group."""

    def join(self, items: NDArray[np.int64]) -> None:
        """Make one group of the groups of these items."""
        labels = np.unique(self.labels[items])
        if len(labels) > 1:
            self.labels[np.isin(self.labels, labels)] = labels[0]

    def join_equal(self, keys: Sequence[Hashable]) -> None:
        """Join the groups of items with equal keys."""
        items: dict[Hashable, list[int]] = defaultdict(list)
        for item, key in enumerate(keys):
            items[key].append(item)
        for equal in items.values():
            if len(equal) > 1:
                self.join(np.array(equal))

    def sizes(self) -> NDArray[np.int64]:
        """Return the size of the group of each item (N,)."""
        return np.bincount(self.labels)[self.labels]


def group_similar(files: Sequence[str], max_pixels: int) -> NDArray[np.int64]:
    """Return a label for each image (N,), the same for images that look alike, directly or through others.

    Files that cannot be read look like no other. The labels of many files are kept in the cache.

    Args:
        files: paths.
        max_pixels: larger images are not read.
    """
    count = len(files)
    columns: dict[str, NDArray[Any]] = {
        "bits": np.zeros((count, BYTES), np.uint8),
        "is_known": np.zeros(count, np.bool_),
    }
    columns["file_sizes"], columns["modified"] = read_states(files).T.copy()
    names = "\0".join(files).encode("utf-8", "surrogateescape")
    path = cache_file("looks", sha256(names).hexdigest()) if count >= MIN_CACHED_FILES else None
    key = {"version": CACHE_VERSION, "max_pixels": max_pixels, "count": count}
    cached = load_columns(path, key)
    is_new = np.ones(count, np.bool_)
    if cached is not None:
        is_new = (cached["file_sizes"] != columns["file_sizes"]) | (cached["modified"] != columns["modified"])
        if not is_new.any():
            return cached["labels"]
        for name in ("bits", "is_known"):
            columns[name][~is_new] = cached[name][~is_new]
    _describe_images(files, np.flatnonzero(is_new).tolist(), max_pixels, columns)
    columns["labels"] = _join_similar(files, columns["bits"], columns["is_known"])
    save_columns(path, key, columns)
    return columns["labels"]


def _join_similar(files: Sequence[str], bits: NDArray[np.uint8], is_known: NDArray[np.bool_]) -> NDArray[np.int64]:
    groups = Groups(len(files))
    known = np.flatnonzero(is_known)
    flags = np.unpackbits(bits, axis=1).astype(np.float32)
    set_bits = flags.sum(axis=1)
    ordered = np.array([index for index in _order_by_number(files) if is_known[index]], dtype=np.int64)
    one, other = ordered[:-1], ordered[1:]
    both = (flags[one] * flags[other]).sum(axis=1)
    follow = _are_alike(both, set_bits[one] + set_bits[other], MAX_SEQUENCE_DISTANCE, MIN_SEQUENCE_SHARE)
    for place in np.flatnonzero(follow).tolist():
        groups.join(ordered[place : place + 2])
    for place in range(BYTES):
        order = known[np.argsort(bits[known, place], kind="stable")]
        for bucket in np.split(order, np.flatnonzero(np.diff(bits[order, place])) + 1):
            if len(np.unique(groups.labels[bucket])) < 2:
                continue
            for start in range(0, len(bucket), ROWS):
                rows = bucket[start : start + ROWS]
                total = set_bits[rows][:, None] + set_bits[bucket]
                alike = _are_alike(flags[rows] @ flags[bucket].T, total, MAX_DISTANCE, MIN_SHARE)
                for row in np.flatnonzero(alike.sum(axis=1) > 1).tolist():
                    groups.join(bucket[alike[row]])
    return groups.labels


def _are_alike(both: NDArray[np.float32], total: NDArray[np.float32], limit: int, share: int) -> NDArray[np.bool_]:
    """Return whether pairs of images look alike.

    Args:
        both: number of bits that are set in both images of a pair.
        total: sum of the numbers of bits that are set in each of them.
        limit: largest number of differing bits.
        share: at most one of this number of the bits that are set in either image may differ.
    """
    result: NDArray[np.bool_] = total - 2 * both <= np.minimum(limit, (total - both) // share)
    return result


def _order_by_number(files: Sequence[str]) -> list[int]:
    """Return the indices of the files in the order of their folders and names, numbers in their natural order."""

    def key(index: int) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", str(PurePath(files[index]).with_suffix("")))
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(range(len(files)), key=key)


def _describe_images(
    files: Sequence[str], indices: Sequence[int], max_pixels: int, columns: Mapping[str, NDArray[Any]]
) -> None:
    """Set the bits of images, packed (N, 16), and whether they are known (N,)."""
    with warnings.catch_warnings():  # the checks of the data report what is wrong
        warnings.simplefilter("ignore")
        chunks = map_chunks(partial(_describe_chunk, max_pixels=max_pixels), [files[index] for index in indices])
    for index, row in zip(indices, (row for chunk in chunks for row in chunk), strict=True):
        columns["is_known"][index] = row is not None
        columns["bits"][index] = 0 if row is None else row


def _describe_chunk(files: Sequence[str], max_pixels: int) -> list[NDArray[np.uint8] | None]:
    return [_describe_image(file, max_pixels) for file in files]


def _describe_image(file: str, max_pixels: int) -> NDArray[np.uint8] | None:
    try:
        with Image.open(file) as image:
            if image.width * image.height > max_pixels:
                return None
            image.draft("L", (4 * SIDE, 4 * SIDE))  # a JPEG is decoded at an eighth of its size
            gray = image.convert("F" if image.mode[0] in "IF" else "L")
            values = np.asarray(gray.resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX), dtype=np.float64)
    except Exception:  # a damaged file raises errors of any type
        return None
    bits = [values[:-1, 1:] > values[:-1, :-1], values[1:, :-1] > values[:-1, :-1]]
    return np.packbits(np.concatenate([part.ravel() for part in bits]))
