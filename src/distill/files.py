"""Files that appear whole or not at all, even if the power fails: whoever finds one can trust it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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
