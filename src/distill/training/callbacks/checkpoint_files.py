"""How a checkpoint reaches the disk and comes back: whole, or as the one before it."""

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
    """Lightning's way to the disk: ``Trainer(plugins=[CheckpointFiles()])``.

    A checkpoint is written beside its place, and takes its name once it lies on the disk; ``last.ckpt`` leaves the one
    before as ``last-1.ckpt``. It is read after its checksums were compared, as data alone: nothing in it is run.

    Args:
        forget: parts of a checkpoint that are left out when it is read.
    """

    def __init__(self, forget: Sequence[str] = ()) -> None:
        self.forget = tuple(forget)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it whole.

        Raises:
            DistillError: the disk is full or refuses it; what stood there stands there still.
        """
        path = Path(path)
        for left in path.parent.glob(f".{path.name}.*.part"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        content = io.BytesIO()  # torch's own writer would lose the reason of a failure
        torch.save(checkpoint, content)
        try:
            keep = previous_checkpoint(path) if path.name == LAST else None
            atomic_write(path, lambda file: file.write(content.getbuffer()), keep)
        except OSError as error:
            raise DistillError(_write_failure(path, len(content.getbuffer()), error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read it, or the one before where it is damaged, saying so.

        Raises:
            DistillError: there is no whole one, or it is not a checkpoint.
        """
        content = read_checkpoint(latest_intact_checkpoint(Path(path)))
        return {name: value for name, value in content.items() if name not in self.forget}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Take it away, if it is there."""
        Path(path).unlink(missing_ok=True)


def latest_intact_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the one before it where it is damaged or was lost in the writing; says so.

    A damaged one is set aside as ``last.ckpt.damaged``, so that it never takes the place of the one before.

    Raises:
        DistillError: neither is whole.
    """
    other = previous_checkpoint(path)
    fault = "it is missing" if not path.is_file() else _damage(path)
    if fault is None:
        return path
    if not other.is_file() or _damage(other) is not None:
        raise DistillError(
            f"the checkpoint {path} cannot be read: {fault}, and there is none before it that could be. Name another one "
            "with ckpt_path=FILE, or start anew without ckpt_path"
        )
    with suppress(FileNotFoundError):  # another process was faster
        path.replace(path.with_name(f"{path.name}.damaged"))
    warnings.warn(f"the checkpoint {path} cannot be read: {fault}. Going on from the one before, {other}", stacklevel=2)
    return other


def _damage(path: Path) -> str | None:
    """What is wrong with a file of torch's, by the checksums that it carries."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        return f"it is not whole ({error})"
    return None if damaged is None else f"its part {damaged} is damaged"


def read_checkpoint(path: Path, lazily: bool = False) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; ``lazily`` without its tensors' bytes until they are asked for.

    Raises:
        DistillError: it holds more than data.
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
    kept = [str(each) for each in (path, previous_checkpoint(path)) if each.is_file()]
    rest = f"{kept[0]} is whole, ckpt_path=last goes on from it" if kept else "there is none from before"
    return (
        f"the checkpoint {path} of {size / 2**20:.0f} MiB could not be written: {why}. Make room, or choose another disk with "
        f"paths.outputs; {rest}"
    )
