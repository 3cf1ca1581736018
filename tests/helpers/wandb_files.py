"""What an offline run of W&B has written."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK, HEADER = 32768, 7
"""Bytes of a block of the file, and of the header of the file and of each part of a record (LevelDB's log format)."""
FULL, LAST = 1, 4
"""Types of a part that ends its record."""


class WandbFile(NamedTuple):
    run: Any
    axes: dict[str, str]
    """Metric or pattern -> metric of its horizontal axis."""
    best: dict[str, str]
    """Metric or pattern -> max or min, its value in the summary."""
    summary: dict[str, Any]
    logged: set[str]
    """Names of logged values."""
    files: dict[str, Path]
    """Path in an artifact -> the file that would be uploaded."""


def read_wandb(file: Path, is_complete: Callable[[WandbFile], bool]) -> WandbFile:
    """Read a file ``run-ID.wandb``. W&B's own process writes its end, so wait up to a minute until it is complete."""
    deadline, found = time.monotonic() + 60, _read(file)
    while not is_complete(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        found = _read(file)
    return found


def _read(file: Path) -> WandbFile:
    from wandb.proto.wandb_internal_pb2 import Record

    found = WandbFile(None, {}, {}, {}, set(), {})
    for content in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found = found._replace(run=record.run)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            found.axes[name] = record.metric.step_metric
            found.best[name] = "max" if record.metric.summary.max else "min" if record.metric.summary.min else ""
        elif kind == "summary":
            found.summary.update({_key(item): json.loads(item.value_json) for item in record.summary.update})
        elif kind == "history":
            found.logged.update(_key(item) for item in record.history.item)
        elif kind == "artifact":
            found.files.update({entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents})
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(content: bytes) -> Iterator[bytes]:
    place, record = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block is too small for a part
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield record
            record = b""
