"""A folder that appears complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.export.folder import complete_folder
from distill.types import DistillError


def write(path: Path, text: str) -> None:
    with complete_folder(path, "proof.json") as folder:
        (folder / "proof.json").write_text(text)


def test_a_previous_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    out = tmp_path / "models"
    out.mkdir()
    write(out, "first")
    write(out, "second")
    assert [file.read_text() for file in out.iterdir()] == ["second"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("my own")
    with pytest.raises(DistillError, match="not replaced"):
        write(photos, "third")
    assert (photos / "holiday.jpg").read_text() == "my own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "photos"]
