"""YOLO data sets that were written on another machine or by other tools."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from distill.data.yolo import Yolo

LABELS = "0 0.5 0.5 0.5 0.5\n1 0.25 0.25 0.5 0.5\n"
BOXES = [[10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 20.0, 20.0]]


def write(folder: Path, train: str = "images/train", names: str = "[cat, dog]", encoding: str = "utf-8") -> Path:
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "images" / "train" / "a.png")
    (folder / "labels" / "train" / "a.txt").write_text(LABELS, encoding=encoding)
    (folder / "data.yaml").write_text(f"train: {train}\nnames: {names}\n", encoding=encoding)
    return folder


@pytest.mark.parametrize(
    "train",
    [
        "C:\\Users\\me\\set\\images\\train",
        "/content/datasets/set/images/train",
        "D:/set/images/train/",
        "/somewhere/else/list.txt",
    ],
)
def test_an_absolute_path_of_another_machine(tmp_path: Path, train: str) -> None:
    write(tmp_path, train)
    (tmp_path / "list.txt").write_text("/content/set/images/train/a.png\n", encoding="utf-16")
    (record,) = Yolo(str(tmp_path)).read_split("train")[1]
    assert record.file == str(tmp_path / "images" / "train" / "a.png")
    assert record.boxes.tolist() == BOXES


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_files_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    classes, (record,) = Yolo(str(write(tmp_path, names="[Käse, dog]", encoding=encoding))).read_split("train")
    assert classes == ("Käse", "dog")
    assert record.boxes.tolist() == BOXES


def test_classes_are_chosen_and_merged(tmp_path: Path) -> None:
    write(tmp_path)
    classes, records = Yolo(str(tmp_path), classes=["dog"]).read_split("train")
    assert (classes, records[0].labels.tolist(), records[0].boxes.tolist()) == (("dog",), [1], BOXES[1:])
    assert records.remarks["boxes of other classes dropped"] == 1
    classes, records = Yolo(str(tmp_path), rename={"cat": "dog"}).read_split("train")
    assert (classes, records[0].labels.tolist()) == (("dog",), [1, 1])
