"""Files that appear whole or not at all, even if the power fails: whoever finds one can trust that it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from distill.types import DistillError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Hand a new file to ``write``, and put it in the place of ``path`` once it lies on the disk. Makes missing folders.

    Until then what stood there before stands there still; nothing is left beside it where ``write`` fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """The same for a text, in UTF-8."""
    return write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DistillError: it cannot be read, is no JSON, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DistillError(f"{path}: not JSON ({error}); write or copy it again") from error
    if not isinstance(found, dict):
        raise DistillError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
