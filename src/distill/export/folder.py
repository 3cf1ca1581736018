"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.types import DistillError


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which becomes `path` at the end. A previous `path` is replaced.

    If the body raises, also at ctrl-C, the temporary folder is removed and the previous one stays.

    Raises:
        DistillError: the folder cannot be written, or `path` is an existing file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    if path.exists() and not path.is_dir():
        raise DistillError(f"--out {path}: expected a folder, got a file; name another folder")
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
