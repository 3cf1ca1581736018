"""A checkpoint is complete or not there; a damaged one gives way to the one before it; it is data and nothing else."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.training import checkpoint_io
from distill.training.checkpoint_io import CheckpointFiles, latest_intact_checkpoint, read_checkpoint
from distill.types import DistillError

FILES = CheckpointFiles()


def content(value: float) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((1000,), float(value))}, "epoch": int(value)}


def save(folder: Path, *values: float, name: str = "last") -> Path:
    for value in values:
        FILES.save_checkpoint(content(value), folder / f"{name}.ckpt")
    return folder / f"{name}.ckpt"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_was_saved_comes_back_and_the_one_before_is_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "new", 1, 2, 3)
    assert names(path.parent) == ["last-1.ckpt", "last.ckpt"]
    assert FILES.load_checkpoint(path)["epoch"] == 3
    assert torch.equal(FILES.load_checkpoint(path)["state_dict"]["weight"], torch.full((1000,), 3.0))
    assert read_checkpoint(path.parent / "last-1.ckpt")["epoch"] == 2
    save(tmp_path / "best", 1, 2, name="best")
    assert names(tmp_path / "best") == ["best.ckpt"]
    FILES.remove_checkpoint(path)
    FILES.remove_checkpoint(path)
    assert not path.exists()


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "text"])
def test_a_damaged_newest_gives_way_to_the_one_before(harm: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2)
    whole = path.read_bytes()
    middle = whole.index(torch.full((1000,), 2.0).numpy().tobytes()) + 1999
    spoilt = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "text": b"<html>",
    }
    path.write_bytes(spoilt[harm])
    with pytest.warns(
        UserWarning, match=r"last\.ckpt cannot be read: .*The run resumes from the previous one, .*last-1\.ckpt"
    ):
        assert FILES.load_checkpoint(path)["epoch"] == 1
    # It is set aside: the next one must not push the only whole one out.
    assert names(tmp_path) == ["last-1.ckpt", "last.ckpt.damaged"]
    with pytest.warns(UserWarning, match="it is missing"):
        assert FILES.load_checkpoint(path)["epoch"] == 1
    save(tmp_path, 3)
    assert (FILES.load_checkpoint(path)["epoch"], read_checkpoint(tmp_path / "last-1.ckpt")["epoch"]) == (3, 1)


def test_where_neither_is_whole_it_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    path.write_bytes(b"")
    with pytest.raises(DistillError, match=r"incomplete.*no intact checkpoint before it.*ckpt_path=FILE"):
        latest_intact_checkpoint(path)
    assert names(tmp_path) == ["last.ckpt"]
    save(tmp_path, 1, 2)
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(DistillError, match="no intact checkpoint before it"):
        latest_intact_checkpoint(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_checkpoint_before(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, 2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            whole = checkpoint_io.atomic_write
            patch.setattr(checkpoint_io, "atomic_write", lambda path, write, keep: whole(path, full, keep))
        with pytest.raises(DistillError) as caught:
            save(tmp_path, 3)
    said = str(caught.value)
    assert os.strerror(number) in said
    assert ("MiB are free" in said) == (number != errno.EIO)
    assert f"{path} is complete" in said
    assert "ckpt_path=last" in said
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert FILES.load_checkpoint(path)["epoch"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' device that is always full")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *mode: opened(Path("/dev/full") if self.suffix == ".part" else self, *mode)
    )
    with pytest.raises(DistillError, match=r"No space left on device.*is complete"):
        save(tmp_path, 2)
    assert read_checkpoint(path)["epoch"] == 1


def test_the_first_checkpoint_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DistillError, match="there is no earlier checkpoint"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.123456.part").write_bytes(b"half")
    (tmp_path / ".best.ckpt.123456.part").write_bytes(b"half")
    save(tmp_path, 1)
    assert names(tmp_path) == [".best.ckpt.123456.part", "last.ckpt"]


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    for name, write in {
        "zip": torch.save,
        "pickle": lambda what, file: Path(file).write_bytes(pickle.dumps(what)),
    }.items():
        file = tmp_path / f"{name}.ckpt"
        write({"state_dict": {}, "extra": Harm(harmed)}, file)
        with pytest.raises(DistillError):
            FILES.load_checkpoint(file, weights_only=False)
    assert not harmed.exists()
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(DistillError, match="is not a checkpoint of a run"):
        FILES.load_checkpoint(tmp_path / "list.ckpt")


def test_parts_can_be_forgotten(tmp_path: Path) -> None:
    assert CheckpointFiles(forget=["epoch", "unknown"]).load_checkpoint(save(tmp_path, 1)).keys() == {"state_dict"}
