"""Names of image files in COCO files that differ from the names on the disk."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from distill.data.layouts import recognize
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
        ("train0.PNG", "train0.png"),
        ("train0.png", "train0.PNG"),
        ("Train0.png", "TRAIN0.PNG"),
        ("/home/me/x/images/a.png", "a.png"),
        ("/home/me/x/images/sub/a.png", "sub/a.png"),
        ("C:\\Users\\me\\images\\a%20b.png", "a b.png"),
        ("http://localhost:8080/data/upload/1/a.png", "a.png"),
        ("a.png", "sub/a.png"),
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


def test_paths_of_another_machine_in_folders_of_their_own(tmp_path: Path) -> None:
    """No usual folder holds the names. Both cameras name their images alike."""
    content = coco_content(count=2)
    write_coco(tmp_path, train=content)
    for number in range(2):
        (tmp_path / "photos" / f"cam{number}").mkdir(parents=True)
        (tmp_path / f"train{number}.png").rename(tmp_path / "photos" / f"cam{number}" / "0.png")
        content["images"][number]["file_name"] = f"/mnt/photos/cam{number}/0.png"
    (tmp_path / "train.json").write_text(json.dumps(content))
    files = [record.file for record in coco_data(tmp_path, "train").records("train")]
    assert files == [str(tmp_path / "photos" / f"cam{number}" / "0.png") for number in range(2)]
    for number in range(2):
        content["images"][number]["file_name"] = "0.png"  # names both images
    content["images"] = content["images"][:1]
    content["annotations"] = content["annotations"][:2]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(DistillError, match="no such image"):
        coco_data(tmp_path, "train").records("train")


def test_another_image_format_is_another_image(tmp_path: Path) -> None:
    content = coco_content()
    write_coco(tmp_path, train=content)
    (tmp_path / "train0.png").rename(tmp_path / "train0.bmp")
    with pytest.raises(DistillError, match=r"train0\.png: no such image"):
        coco_data(tmp_path, "train").records("train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_an_annotation_file_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    """As PowerShell and Windows' editor save it."""
    content = coco_content()
    content["categories"][0]["name"] = "Käse"
    write_coco(tmp_path, train=content)
    (tmp_path / "train.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert recognize(tmp_path).settings["train.annotations"] == "train.json"
    data = coco_data(tmp_path, "train")
    assert boxes_by_file(data, "train")["train0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert data.classes == ("Käse", "dog")
    content["images"][0]["height"] = "forty"  # read entry by entry
    (tmp_path / "train.json").write_text(json.dumps(content), encoding=encoding)
    assert len(coco_data(tmp_path, "train", on_error="skip").records("train")) == 2


def test_an_image_that_is_listed_twice_under_one_id(tmp_path: Path) -> None:
    content = coco_content()
    content["images"].append(content["images"][0])
    write_coco(tmp_path, train=content)
    with pytest.raises(DistillError, match=r"images\[3\] \(train0\.png\) has id 1 again, with the same name; remove"):
        coco_data(tmp_path, "train").records("train")


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
