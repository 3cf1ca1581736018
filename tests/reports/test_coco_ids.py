"""Ids in COCO files as tools really write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.types import DistillError
from helpers.coco_files import boxes_by_file, coco_content, coco_data, write_coco

PLAIN = {
    "train0.png": [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)],
    "train1.png": [(1, 3, 2, 25, 14), (2, 4, 2, 27, 14)],
    "train2.png": [(1, 5, 2, 29, 14), (2, 6, 2, 31, 14)],
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_annotation_ids_that_start_anew_in_each_image(tmp_path: Path, on_error: str) -> None:
    content = coco_content()
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number % 2
    write_coco(tmp_path, train=content)
    data = coco_data(tmp_path, "train", on_error=on_error)
    assert boxes_by_file(data, "train") == PLAIN
    assert "4 annotation ids repeated" in data.summary[0]


@pytest.mark.parametrize("number", ["x1", 1.5, None, True, 2**70])
def test_annotation_ids_of_any_kind(tmp_path: Path, number: object) -> None:
    content = coco_content()
    for annotation in content["annotations"][1:3]:
        annotation["id"] = number
    write_coco(tmp_path, train=content)
    assert boxes_by_file(coco_data(tmp_path, "train"), "train") == PLAIN


@pytest.mark.parametrize("keys", [("id",), ("image_id",), ("category_id",), ("id", "image_id", "category_id")])
def test_ids_written_as_text(tmp_path: Path, keys: tuple[str, ...]) -> None:
    content = coco_content()
    for key in keys:
        for row in [*content["images"], *content["categories"], *content["annotations"]]:
            if key in row:
                row[key] = str(row[key])
    write_coco(tmp_path, train=content)
    data = coco_data(tmp_path, "train")
    assert boxes_by_file(data, "train") == PLAIN
    assert data.category_ids == {1: 1, 2: 2}
    if keys != ("category_id",):
        assert "ids written as text" in data.summary[0]


@pytest.mark.parametrize("text", ["", "3a", "03", "3.0", " 3", "٣", "1" * 30])
def test_texts_that_are_no_ids(tmp_path: Path, text: str) -> None:
    content = coco_content()
    content["images"][2]["id"] = text
    write_coco(tmp_path, train=content)
    with pytest.raises(DistillError, match=r"images\[2\] needs an integer 'id'"):
        coco_data(tmp_path, "train").records("train")
