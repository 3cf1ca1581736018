"""Lists and files that name an image twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from distill.data.checks import check_records
from distill.data.records import Annotation, Record, make_record
from distill.types import DistillError


def record(number: int, file: Path, *boxes: tuple[float, ...]) -> Record:
    notes = [Annotation(box, 1, 100.0, False, False, place, None) for place, box in enumerate(boxes)]
    return make_record(number, str(file), (20, 40), notes, "a.json")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for file in files:
        Image.new("RGB", (40, 20)).save(file)
    return files


def test_an_image_listed_twice_with_the_same_boxes_counts_once(files: list[Path]) -> None:
    box = (1.0, 2.0, 11.0, 12.0)
    records, report = check_records(
        [record(1, files[0], box), record(2, files[1], box), record(3, files[0], box)], "train"
    )
    assert records.ids.tolist() == [1, 2]
    assert records.row_counts().tolist() == [1, 1]
    assert "1 images listed twice with the same boxes" in str(report)


def test_an_image_whose_boxes_are_parted_between_two_entries_is_left_out(files: list[Path]) -> None:
    """Either entry alone would make the other one's objects background."""
    first, second = (1.0, 2.0, 11.0, 12.0), (20.0, 2.0, 31.0, 12.0)
    entries = [record(1, files[0], first), record(2, files[1], first), record(3, files[0], second)]
    with pytest.raises(DistillError, match=r"a\.png: this image is listed twice; list it once, with all its boxes"):
        check_records(entries, "train")
    records, report = check_records(
        [record(1, files[0], first), record(2, files[1], first), record(3, files[0], second)], "train", "skip"
    )
    assert records.ids.tolist() == [2]
    assert report.skipped["images skipped"] == 2
