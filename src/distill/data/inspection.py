"""Inspection of the image files of a split: existence, size, orientation and completeness.

The facts of intact files are kept in a cache. A file is inspected again if its size or modification time has changed.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.data.column_cache import cache_file, load_columns, save_columns
from distill.imaging.decoding import ImageInfo, inspect_image
from distill.types import DistillError

T = TypeVar("T")

THREADS = 16
CHUNK = 256
"""Files per task of a thread."""
MIN_CACHED_FILES = 1000
"""Smallest number of files whose facts are kept in the cache."""
CACHE_VERSION = 1
"""Raise this number if `inspect_image` returns other facts of the same file."""
FACTS = ("sizes", "orientations", "bits")


@dataclass
class Inspection:
    """Facts of N image files. Rows of faulty files are 0."""

    file_sizes: NDArray[np.int64]
    """(N,) bytes; -1 if there is no such file."""
    modified: NDArray[np.int64]
    """(N,) modification times in nanoseconds."""
    sizes: NDArray[np.int64]
    """(N, 2) heights and widths of the upright images."""
    orientations: NDArray[np.int64]
    """(N,) EXIF orientations."""
    bits: NDArray[np.int64]
    """(N,) bits per channel."""
    faults: dict[int, str] = field(default_factory=dict)
    """Messages by index of the file, except for files that are missing."""


def inspect_files(files: Sequence[str], max_pixels: int) -> Inspection:
    """Inspect image files.

    Args:
        files: paths.
        max_pixels: largest number of pixels of an image.
    """
    count = len(files)
    file_sizes, modified = read_states(files).T.copy()
    facts = Inspection(
        file_sizes,
        modified,
        sizes=np.zeros((count, 2), np.int64),
        orientations=np.zeros(count, np.int64),
        bits=np.zeros(count, np.int64),
    )
    names = "\0".join(files).encode("utf-8", "surrogateescape")
    path = cache_file("images", sha256(names).hexdigest()) if count >= MIN_CACHED_FILES else None
    key = {"version": CACHE_VERSION, "max_pixels": max_pixels, "count": count}
    is_new = file_sizes >= 0
    known = load_columns(path, key)
    if known is not None:
        same = known["is_intact"] & (known["file_sizes"] == file_sizes) & (known["modified"] == modified)
        for name in FACTS:
            getattr(facts, name)[same] = known[name][same]
        is_new &= ~same
    indices = np.flatnonzero(is_new)
    _inspect_new_files(files, indices.tolist(), max_pixels, facts)
    if len(indices) > len(facts.faults):
        is_intact = file_sizes >= 0
        is_intact[list(facts.faults)] = False
        columns = {name: getattr(facts, name) for name in ("file_sizes", "modified", *FACTS)}
        save_columns(path, key, columns | {"is_intact": is_intact})
    return facts


def read_states(files: Sequence[str]) -> NDArray[np.int64]:
    """Return the size in bytes and the modification time of each file (N, 2); -1 and 0 if there is no such file."""
    states = [state for chunk in map_chunks(_read_states, files) for state in chunk]
    return np.array(states, dtype=np.int64).reshape(-1, 2)


def _inspect_new_files(files: Sequence[str], indices: Sequence[int], max_pixels: int, facts: Inspection) -> None:
    # Pillow warns of large images and of damaged tags; both are readable. Warning filters apply to all threads, so the
    # filter is set once, outside the threads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunks = map_chunks(partial(_inspect_chunk, max_pixels=max_pixels), [files[index] for index in indices])
    results = (result for chunk in chunks for result in chunk)
    for index, result in zip(indices, results, strict=True):
        if isinstance(result, str):
            facts.faults[index] = result
        else:
            facts.sizes[index], facts.orientations[index], facts.bits[index] = (
                result.size,
                result.orientation,
                result.bits,
            )


def map_chunks(function: Callable[[Sequence[str]], list[T]], files: Sequence[str]) -> list[list[T]]:
    """Call a function with parts of a list of files, in threads, and return its results."""
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, chunks))


def _read_states(files: Sequence[str]) -> list[tuple[int, int]]:
    states = []
    for file in files:
        try:
            state = os.stat(file)
        except (OSError, ValueError):
            states.append((-1, 0))
        else:
            states.append((state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else (-1, 0))
    return states


def _inspect_chunk(files: Sequence[str], max_pixels: int) -> list[ImageInfo | str]:
    """Return the facts of each image, or a message about a faulty file."""
    results: list[ImageInfo | str] = []
    for file in files:
        try:
            results.append(inspect_image(file, max_pixels))
        except (DistillError, OSError, ValueError) as error:
            results.append(str(error))
    return results
