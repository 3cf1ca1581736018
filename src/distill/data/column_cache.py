"""A cache of arrays on the disk, which runs and ranks share. It never has to be trusted or repaired.

One file holds a header and the columns, all in NumPy's `.npy` format without pickled objects. The header has the key
that describes the source of the columns, and a checksum of the columns with their names, types and shapes. A file with
another key, a damaged file and a file of another version are ignored and later replaced. A folder that is read-only or
full is no error: nothing is kept then.

The files lie in the folder of the environment variable `DISTILL_CACHE`; by default in `distill` below `XDG_CACHE_HOME`
or `~/.cache`. An empty `DISTILL_CACHE` switches the cache off. The folder can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tokenize
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from distill.files import atomic_write

VERSION = 2
"""Version of the file format."""
LOCK_TIMEOUT = 900
"""Seconds that a process waits for another process that computes the same columns."""
READ_SIZE = 2**20
Columns = Mapping[str, NDArray[Any]]


def cache_file(kind: str, identity: str, suffix: str = ".npy") -> Path | None:
    """Return the file for the columns of this kind and identity, or None if the cache is off.

    Args:
        kind: first part of the file's name.
        identity: text that differs for sources that must not replace each other's columns.
        suffix: extension of the file.
    """
    folder = os.environ.get("DISTILL_CACHE")
    if folder == "":
        return None
    try:
        place = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill").expanduser()
    except RuntimeError:  # no home folder
        return None
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    return place / f"{kind}-{digest[:24]}{suffix}"


def load_columns(path: Path | None, key: Mapping[str, Any]) -> dict[str, NDArray[Any]] | None:
    """Load columns, mapped into memory, or return None if the file is missing, damaged, or has another key.

    Changes of an array stay in this process.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            header = json.loads(np.lib.format.read_array(file, allow_pickle=False).tobytes())
            if (header["version"], header["key"]) != (VERSION, json.loads(json.dumps(key))):
                return None
            checksum, columns = 0, {}
            for name in header["names"]:
                columns[name], checksum = _map_array(file, checksum)
            return columns if _add_forms(checksum, columns) == header["checksum"] else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, MemoryError, tokenize.TokenError):
        return None


def save_columns(path: Path | None, key: Mapping[str, Any], columns: Columns) -> None:
    """Save columns atomically. Nothing happens if the folder cannot be written.

    Args:
        path: file of `cache_file`.
        key: facts of the source as plain values. Columns are loaded only with an equal key.
        columns: arrays by name.
    """
    if path is None:
        return
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    checksum = 0
    for array in arrays.values():
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    header = {"version": VERSION, "key": key, "names": list(columns), "checksum": _add_forms(checksum, arrays)}

    def write(file: BinaryIO) -> None:
        for array in (np.frombuffer(json.dumps(header).encode(), np.uint8), *arrays.values()):
            np.lib.format.write_array(file, array, allow_pickle=False)

    with suppress(OSError):
        atomic_write(path, write)


@contextmanager
def exclusive(path: Path | None, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Let one process at a time compute the content of a file, where the folder can be written.

    Args:
        path: the file; None: nothing is locked.
        timeout: seconds to wait for another process; -1: for as long as it takes.
    """
    lock = None
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"), timeout=timeout)
            lock.acquire()
        except (OSError, Timeout, NotImplementedError):
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _add_forms(checksum: int, columns: Columns) -> int:
    """Continue a checksum by the names, types and shapes of columns."""
    forms = [[name, array.dtype.str, array.shape] for name, array in columns.items()]
    return zlib.crc32(json.dumps(forms).encode(), checksum)


def _map_array(file: BinaryIO, checksum: int) -> tuple[NDArray[Any], int]:
    """Map the next array of a file into memory and return it with the checksum continued by its bytes."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("pickled objects")
    start, rest = file.tell(), int(np.prod(shape)) * dtype.itemsize
    while rest:  # reading instead of mapping keeps the bytes out of the process
        content = file.read(min(rest, READ_SIZE))
        if not content:
            raise EOFError
        checksum, rest = zlib.crc32(content, checksum), rest - len(content)
    end = file.tell()
    array = np.memmap(file, dtype, "c", start, shape) if end > start else np.empty(shape, dtype)
    file.seek(end)
    return array, checksum
