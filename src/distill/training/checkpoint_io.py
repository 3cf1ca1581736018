"""Lightning's plugin for checkpoint files: writes them atomically, and reads the latest intact one."""

from __future__ import annotations

import errno
import io
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from distill.files import atomic_write, load_tensors
from distill.run_folder import LAST, previous_checkpoint
from distill.types import DistillError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointFiles(CheckpointIO):
    """Lightning's plugin for checkpoint files: ``Trainer(plugins=[CheckpointFiles()])``.

    A checkpoint is written to a temporary file, which is renamed once it is on the disk. A new ``last.ckpt`` keeps the
    previous one as ``last-1.ckpt``. Before a checkpoint is read, its checksums are compared. The checkpoint is read as
    plain data, so that no code in it can run.

    Args:
        forget: entries of a checkpoint that are ignored when it is read.
    """

    def __init__(self, forget: Sequence[str] = ()) -> None:
        self.forget = tuple(forget)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            DistillError: the disk is full or not writable; the previous file is unchanged.
        """
        path = Path(path)
        for left in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        content = io.BytesIO()  # torch's own file writer does not report why it failed
        torch.save(checkpoint, content)
        try:
            keep = previous_checkpoint(path) if path.name == LAST else None
            atomic_write(path, lambda file: file.write(content.getbuffer()), keep)
        except OSError as error:
            raise DistillError(_write_failure(path, len(content.getbuffer()), error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, or the previous one with a warning if it is damaged.

        Raises:
            DistillError: no checkpoint is intact, or the file is not a checkpoint.
        """
        content = read_checkpoint(latest_intact_checkpoint(Path(path)))
        return {name: value for name, value in content.items() if name not in self.forget}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint if it exists."""
        Path(path).unlink(missing_ok=True)


def latest_intact_checkpoint(path: Path) -> Path:
    """The checkpoint, or the previous one with a warning if it is damaged or missing.

    A damaged file is renamed to ``last.ckpt.damaged``, so that it never replaces the previous checkpoint.

    Raises:
        DistillError: neither checkpoint is intact.
    """
    other = previous_checkpoint(path)
    fault = "it is missing" if not path.is_file() else _damage(path)
    if fault is None:
        return path
    if not other.is_file() or _damage(other) is not None:
        raise DistillError(
            f"the checkpoint {path} cannot be read: {fault}, and there is no intact checkpoint before it. Name another "
            "one with ckpt_path=FILE, or start a new run without ckpt_path"
        )
    with suppress(FileNotFoundError):  # another process has renamed it
        path.replace(path.with_name(f"{path.name}.damaged"))
    warnings.warn(
        f"the checkpoint {path} cannot be read: {fault}. The run resumes from the previous one, {other}", stacklevel=2
    )
    return other


def _damage(path: Path) -> str | None:
    """Describe the damage of a file that torch wrote, by its checksums; None if the file is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        return f"it is incomplete ({error})"
    return None if damaged is None else f"its part {damaged} is damaged"


def read_checkpoint(path: Path, lazily: bool = False) -> dict[str, Any]:
    """Read the content of a checkpoint, on the CPU. ``lazily`` reads the bytes of a tensor on first use.

    Raises:
        DistillError: the file is not a checkpoint, or contains more than plain data.
    """
    content = load_tensors(path, lazily)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise DistillError(f"{path} is not a checkpoint of a run. Name one of its checkpoints folder")
    return content


def _write_failure(path: Path, size: int, error: OSError) -> str:
    why = error.strerror or str(error)
    if error.errno in DISK_FULL:
        with suppress(OSError):
            why += f", {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free"
    kept = [str(file) for file in (path, previous_checkpoint(path)) if file.is_file()]
    rest = f"{kept[0]} is complete, and ckpt_path=last resumes from it" if kept else "there is no earlier checkpoint"
    return (
        f"the checkpoint {path} of {size / 2**20:.0f} MiB could not be written: {why}. Free disk space, or "
        f"choose another disk with paths.outputs; {rest}"
    )
