"""Folders of data sets as tools write them, and what they are recognized as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.data.layouts import recognize, split_of
from distill.types import DistillError

COCO = json.dumps({"info": {}, "images": [], "annotations": [], "categories": []})
XML = "<annotation/>"
YOLO = "names: [cat]\ntrain: images/train\n"

LAYOUTS: dict[str, tuple[dict[str, str], str, dict[str, Any]]] = {
    "COCO as published": (
        {
            "annotations/instances_train2017.json": COCO,
            "annotations/instances_val2017.json": COCO,
            "annotations/captions_train2017.json": json.dumps({"images": [], "annotations": []}),
            "annotations/person_keypoints_train2017.json": COCO,
            "train2017/1.jpg": "",
        },
        "coco",
        {
            "train.annotations": "annotations/instances_train2017.json",
            "val.annotations": "annotations/instances_val2017.json",
            "test.annotations": None,
        },
    ),
    "Roboflow's COCO": (
        {f"{split}/_annotations.coco.json": COCO for split in ("train", "valid", "test")},
        "coco",
        {
            "train.annotations": "train/_annotations.coco.json",
            "val.annotations": "valid/_annotations.coco.json",
            "test.annotations": "test/_annotations.coco.json",
        },
    ),
    "JSON files at the top": (
        {"my-train.json": COCO, "my-val.json": COCO, "package.json": "{}", ".cache/train.json": COCO},
        "coco",
        {"train.annotations": "my-train.json", "val.annotations": "my-val.json", "test.annotations": None},
    ),
    "one JSON file of CVAT": (
        {"annotations/instances_default.json": COCO},
        "coco",
        {"train.annotations": "annotations/instances_default.json", "val.annotations": None, "test.annotations": None},
    ),
    "VOC as published": (
        {
            "Annotations/a.xml": XML,
            "JPEGImages/a.jpg": "",
            "ImageSets/Main/train.txt": "a",
            "ImageSets/Main/val.txt": "a",
            "ImageSets/Main/cat_train.txt": "a",
        },
        "voc",
        {"train": "train", "val": "val", "test": None},
    ),
    "VOC with trainval and test": (
        {"Annotations/a.xml": XML, "ImageSets/Main/trainval.txt": "a", "ImageSets/Main/test.txt": "a"},
        "voc",
        {"train": "trainval", "val": "test", "test": None},
    ),
    "VOC in subfolders": (
        {"Annotations/cam1/a.xml": XML, "JPEGImages/cam1/a.jpg": "", "ImageSets/Main/train.txt": "cam1/a"},
        "voc",
        {"train": "train", "val": None, "test": None},
    ),
    "LabelImg's two folders": ({"Annotations/a.xml": XML, "images/a.jpg": ""}, "voc", {}),
    "Roboflow's VOC": ({"train/a.xml": XML, "train/a.jpg": "", "valid/b.xml": XML}, "voc", {}),
    "XML beside the images": ({"a.xml": XML, "a.jpg": ""}, "voc", {}),
    "Ultralytics": ({"data.yaml": YOLO, "images/train/a.jpg": "", "labels/train/a.txt": ""}, "yolo", {}),
    "Roboflow's YOLO": ({"data.yaml": YOLO, "train/images/a.jpg": "", "train/labels/a.txt": ""}, "yolo", {}),
    "YOLO without a data.yaml": ({"images/train/a.jpg": "", "labels/train/a.txt": ""}, "yolo", {}),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognized(name: str, tmp_path: Path) -> None:
    files, option, settings = LAYOUTS[name]
    layout = recognize(write(tmp_path / "data", files))
    assert layout.option == option
    assert layout.settings == {"root": str(tmp_path / "data"), **settings}


def test_a_file_of_a_data_set(tmp_path: Path) -> None:
    write(tmp_path, {"train.json": COCO, "val.json": COCO, "my.yaml": YOLO})
    layout = recognize(tmp_path / "train.json")
    assert (layout.option, layout.settings["val.annotations"]) == ("coco", "val.json")
    write(tmp_path / "coco", LAYOUTS["COCO as published"][0])
    layout = recognize(tmp_path / "coco" / "annotations" / "instances_train2017.json")
    assert layout.settings["root"] == str(tmp_path / "coco")
    assert recognize(tmp_path / "my.yaml").settings == {"root": str(tmp_path / "my.yaml")}
    with pytest.raises(DistillError, match="its name says val, not train"):
        recognize(tmp_path / "val.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": ""}, "no data set recognized"),
        ({"train.json": COCO, "Annotations/a.xml": XML}, r"holds COCO, train train.json and VOC, .* data=coco"),
        ({"val.json": COCO, "test.json": COCO}, "none whose name or folder says train"),
        ({"a_train.json": COCO, "b_train.json": COCO}, "several annotation files are for train: a_train.json"),
        ({"Annotations/a.xml": XML, "ImageSets/Main/cat.txt": "a"}, "expected train.txt or trainval.txt"),
    ],
)
def test_a_folder_that_cannot_be_used_as_it_is(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=message):
        recognize(write(tmp_path, files))


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="no such file or folder"):
        recognize(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("instances_val2017.json", "val"),
        ("trainset.json", "train"),
        ("validation/labels.json", "val"),
        ("train/test_annotations.json", "test"),
        ("retrained.json", None),
    ],
)
def test_the_name_says_the_split(file: str, split: str | None) -> None:
    assert split_of(Path("/data"), Path("/data") / file) == split


def test_a_large_file_is_recognized_by_its_beginning(tmp_path: Path) -> None:
    large = json.dumps({"images": [{"id": number, "file_name": "a" * 40} for number in range(2000)]})
    write(tmp_path, {"train.json": large[:-1] + ', "annotations": [], "categories": []}'})
    assert recognize(tmp_path).option == "coco"


def test_a_named_file_is_for_training_whatever_lies_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train_a.json": COCO, "train_b.json": COCO, "val.json": COCO})
    settings = recognize(folder / "train_b.json").settings
    assert (settings["train.annotations"], settings["val.annotations"]) == ("train_b.json", "val.json")
