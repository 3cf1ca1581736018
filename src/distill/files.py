"""Files that appear whole or not at all, even if the power fails: whoever finds one can trust that it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from distill.types import DistillError


def atomic_write(path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> Path:
    """Hand a new file to ``write``, and put it in the place of ``path`` once it lies on the disk. Makes missing folders.

    Until then what stood there before stands there still; nothing is left beside it where ``write`` fails. With ``keep``
    it is not lost even then: it takes that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        beside.replace(path)
        _fsync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _fsync_folder(folder: Path) -> None:
    """Let the names, too, lie on the disk; where the system cannot, they will in a while."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_text(path: Path, text: str) -> Path:
    """The same for a text, in UTF-8."""
    return atomic_write(path, lambda file: file.write(text.encode()))


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


def load_tensors(path: Path, lazily: bool = False) -> Any:
    """What a file holds, if it holds nothing but tensors and plain containers; ``lazily`` without the tensors' bytes.

    Raises:
        DistillError: it cannot be read, or holds anything else, which is not looked at.
    """
    import torch  # takes seconds, and not every reader of files needs it

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # damaged bytes raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DistillError(f"{path}: not a file of tensors that torch.save wrote whole ({reason})") from error
