"""Atomic writes, and reading of text, JSON and tensor files.

An atomic write leaves either the complete new file or the previous one, also after a crash or a power failure. A reader
never sees part of a file.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from distill.types import DistillError


def atomic_write(path: Path, write: Callable[[BinaryIO], object], backup: Path | None = None) -> Path:
    """Write a file and move it to ``path`` once all bytes are on the disk. Create missing folders.

    If ``write`` raises, ``path`` keeps its previous content, and no temporary file remains.

    Args:
        path: file to create or replace.
        write: receives the open temporary file and writes the content.
        backup: new name of the file that ``path`` replaces; None: the previous file is lost.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            path.replace(backup)
        temporary.replace(path)
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _fsync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk.

    Some systems do not support this. They write the names by themselves after some time.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> Path:
    """Write a text in UTF-8 by `atomic_write`. Line ends are not converted."""
    return atomic_write(path, lambda file: file.write(text.encode()))


def read_text(path: Path) -> str:
    """Read a text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        OSError, ValueError: the file cannot be read or decoded.
    """
    content = path.read_bytes()
    return content.decode(json.detect_encoding(content))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DistillError: the file cannot be read, is not JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DistillError(f"{path}: not JSON ({error}); write or copy the file again") from error
    if not isinstance(content, dict):
        raise DistillError(
            f"{path}: expected a JSON object, got {type(content).__name__}; write or copy the file again"
        )
    return content


def load_tensors(path: Path, mmap: bool = False, foreign: bool = False) -> Any:
    """Load a file of ``torch.save`` onto the CPU. Only tensors and plain containers are accepted, so no code runs.

    Args:
        path: file to load.
        mmap: whether to map the file instead of reading it. The bytes of a tensor are then read on first use.
        foreign: whether files of other projects are read too: plain pickles of NumPy arrays, and files with objects of
            unknown classes, which become inert placeholders. See `restricted_pickle`.

    Raises:
        DistillError: the file cannot be read, is damaged, or holds other objects. Those are not unpickled.
    """
    import torch  # the import takes seconds, and some callers of this module need no tensors

    try:
        with warnings.catch_warnings():
            if foreign:  # torch warns of protocols that it then refuses
                warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes raise exceptions of any type
        if foreign:
            return _load_foreign(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DistillError(
            f"{path}: not a file of tensors that torch.save wrote completely ({reason}); write or copy the file again"
        ) from error


def _load_foreign(path: Path) -> Any:
    from distill import restricted_pickle

    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip and restricted_pickle.is_torchscript(path):
            raise DistillError(
                "it is a TorchScript program, which was not run; give the checkpoint of the training, with a state dict"
            )
        # torch's older format is a sequence of pickles, and the first one is a number.
        first = None if is_zip else restricted_pickle.read_pickle(path)
        return restricted_pickle.read_torch(path) if is_zip or isinstance(first, int) else first
    except DistillError as error:
        raise DistillError(f"{path}: not a file of tensors and arrays alone: {error}") from error
    except Exception as error:  # damaged bytes raise exceptions of any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DistillError(
            f"{path}: not a file of tensors or arrays that was written completely ({reason}); copy or download "
            "the file again"
        ) from error
