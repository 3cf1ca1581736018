"""Images that occur more than once, under the same path or as files with the same content."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from distill.data.inspection import read_states
from distill.data.packed_bytes import PackedBytes
from distill.data.records import Records


def find_shared_files(later: Records, earlier: Records) -> dict[str, str]:
    """Return the files of `later` that `earlier` has, too, under any name, each with the file of `earlier`.

    Only files of equal size are read. A missing file is equal to itself alone.
    """
    sizes = set(later.file_sizes.tolist())
    rivals: dict[int, list[Path]] = defaultdict(list)
    for size, file in zip(earlier.file_sizes.tolist(), earlier.files.texts(), strict=True):
        if size in sizes:
            rivals[size].append(Path(file))
    digests: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in digests:
            content = path.read_bytes() if path.is_file() else os.fsencode(path)
            digests[path] = hashlib.blake2b(content).digest()
        return digests[path]

    shared = {}
    for size, file in zip(later.file_sizes.tolist(), later.files.texts(), strict=True):
        path = Path(file)
        rival = next((rival for rival in rivals[size] if path == rival or digest(path) == digest(rival)), None)
        if rival is not None:
            shared[file] = str(rival)
    return shared


def unify_copies(parts: Sequence[Records]) -> None:
    """Give the images that several joined parts have the path of the first copy. The checks then find them by path."""
    for part in parts:
        part.file_sizes = read_states(part.files.texts())[:, 0]
    for place, later in enumerate(parts):
        shared: dict[str, str] = {}
        for earlier in parts[:place]:
            shared = find_shared_files(later, earlier) | shared
        if shared:
            later.files = PackedBytes.pack_texts([shared.get(file, file) for file in later.files.texts()])
