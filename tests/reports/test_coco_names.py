"""Names of image files in COCO files that differ from the names on the disk."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from distill.types import DistillError
from helpers.coco_files import boxes_by_file, coco_content, coco_data, write_coco


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("folder", ["", "images", "train"])
def test_one_image_is_missing(tmp_path: Path, missing: int, folder: str) -> None:
    content = coco_content()
    write_coco(tmp_path, train=content)
    (tmp_path / folder).mkdir(exist_ok=True)
    for entry in content["images"]:
        (tmp_path / entry["file_name"]).rename(tmp_path / folder / entry["file_name"])
    (tmp_path / folder / f"train{missing}.png").unlink()
    with pytest.raises(DistillError, match=r"train: 1 problems(?s:.)*no such image") as caught:
        coco_data(tmp_path, "train").records("train")
    assert str(tmp_path / folder / f"train{missing}.png") in str(caught.value)
    assert len(coco_data(tmp_path, "train", on_error="skip").records("train")) == 2


@pytest.mark.parametrize(
    ("listed", "on_disk"),
    [
        ("sub\\a b.png", "sub/a b.png"),
        ("a%20b.png", "a b.png"),
        ("sub\\a%20b.png", "sub/a b.png"),
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
        (unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")),
        ("caf%C3%A9.png", unicodedata.normalize("NFD", "café.png")),
    ],
)
def test_the_name_is_written_in_another_form(tmp_path: Path, listed: str, on_disk: str) -> None:
    content = coco_content()
    write_coco(tmp_path, train=content)
    (tmp_path / "sub").mkdir()
    (tmp_path / "train0.png").rename(tmp_path / on_disk)
    content["images"][0]["file_name"] = listed
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = coco_data(tmp_path, "train")
    assert data.records("train")[0].file == str(tmp_path / on_disk)
    assert boxes_by_file(data, "train")[Path(on_disk).name] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert "1 file names written in another form" in data.summary[0]


def test_a_percent_sign_that_belongs_to_the_name(tmp_path: Path) -> None:
    content = coco_content()
    write_coco(tmp_path, train=content)
    (tmp_path / "train0.png").rename(tmp_path / "a%20b.png")
    (tmp_path / "train1.png").rename(tmp_path / "a b.png")
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "a%20b.png", "a b.png"
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = coco_data(tmp_path, "train")
    assert [record.file for record in data.records("train")][:2] == [
        str(tmp_path / "a%20b.png"),
        str(tmp_path / "a b.png"),
    ]
    assert "another form" not in data.summary[0]


@pytest.mark.parametrize("listed", ["..\\secret.png", "%2e%2e/secret.png"])
def test_another_form_does_not_lead_out_of_the_folder(tmp_path: Path, listed: str) -> None:
    home = tmp_path / "data"
    home.mkdir()
    content = coco_content()
    write_coco(home, train=content)
    (home / "train0.png").rename(tmp_path / "secret.png")
    content["images"][0]["file_name"] = listed
    (home / "train.json").write_text(json.dumps(content))
    with pytest.raises(DistillError, match="leads out of"):
        coco_data(home, "train").records("train")
