"""Write a folder completely, or leave the previous folder unchanged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.types import DistillError


@contextmanager
def complete_folder(path: Path, mark: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which becomes `path` at the end. A previous export is replaced.

    If the body raises, at ctrl-C too, the temporary folder is removed and the previous `path` is kept.

    Args:
        path: the folder. Only an empty folder or a previous export may exist there.
        mark: name of a file that every export of this kind has.

    Raises:
        DistillError: the folder cannot be written, or `path` is an existing file, or a folder with other files.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    if path.exists() and not path.is_dir():
        raise DistillError(f"--out {path}: expected a folder, got a file; name another folder")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise DistillError(
            f"--out {path}: the folder has files, and no {mark} of a previous export, so it is not replaced; name a "
            "new folder"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise DistillError(f"--out {path}: cannot be written ({error}); name another folder") from error
    try:
        yield temporary
        previous = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.replace(previous)
        temporary.replace(path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
