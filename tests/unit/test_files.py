"""A file that is written appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from distill.files import atomic_write, write_text


def test_a_failure_half_way_leaves_what_stood_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_text(path, "before")

    def fail(file: BinaryIO) -> None:
        file.write(b"half a ta")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        atomic_write(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "before")]


def test_nobody_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.pt"

    def look(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" and half")

    assert atomic_write(path, look) == path
    assert path.read_bytes() == b"half and half"


def test_it_lies_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename may reach the disk before the bytes do: after a power cut the name would stand for an empty file."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("sync"), sync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda self, other: (done.append("replace"), replace(self, other))[1])
    write_text(tmp_path / "umlaut.txt", "ä\r\n")
    assert done == ["sync", "replace", "sync"]  # the second is of the folder, which holds the name
    assert (tmp_path / "umlaut.txt").read_bytes() == b"\xc3\xa4\r\n"
