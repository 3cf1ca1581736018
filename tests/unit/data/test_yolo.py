"""YOLO's format: boxes against plain arithmetic, the layouts that tools write, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from distill.data.datamodule import DetectionData
from distill.data.yolo import Yolo, label_file, parse_line
from distill.types import DistillError

NAMES = ["cat", "dog"]
BOX = "1 0.5 0.25 0.2 0.1"  # of 100 x 80 pixels: 40 to 60, 16 to 24


def image(file: Path, labels: str | None = BOX, orientation: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (100, 80)).save(file, exif=exif)
    if labels is not None:
        label_file(file).parent.mkdir(parents=True, exist_ok=True)
        label_file(file).write_text(labels)
    return file


def describe(file: Path, **content: Any) -> Path:
    file.write_text(yaml.safe_dump({"names": NAMES, "nc": 2} | content))
    return file


def boxes(source: Yolo, split: str) -> dict[str, list[Any]]:
    """Name of each image -> its boxes with their labels."""
    _, records = source.read_split(split)
    assert [record.faults for record in records] == [[]] * len(records)
    return {
        Path(record.file).name: [
            [*box, label] for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
        ]
        for record in records
    }


EXPECTED = [[pytest.approx(value) for value in (40.0, 16.0, 60.0, 24.0)] + [2]]


@pytest.mark.parametrize("names", [NAMES, {0: "cat", 1: "dog"}])
@pytest.mark.parametrize("layout", ["ultralytics", "roboflow", "yolov5 lists", "folders alone"])
def test_layouts_of_tools(layout: str, names: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if layout == "ultralytics":
        image(tmp_path / "images" / "train" / "a.jpg")
        image(tmp_path / "images" / "val" / "sub" / "b.png")
        describe(tmp_path / "coco8.yaml", names=names, path="../datasets/coco8", train="images/train", val="images/val")
    elif layout == "roboflow":
        image(tmp_path / "train" / "images" / "a.jpg")
        image(tmp_path / "valid" / "images" / "b.png")
        describe(tmp_path / "data.yaml", names=names, train="../train/images", val="../valid/images")
    elif layout == "yolov5 lists":
        image(tmp_path / "images" / "a.jpg")
        image(tmp_path / "images" / "b.png")
        (tmp_path / "train.txt").write_text("./images/a.jpg\n\n")
        (tmp_path / "val.txt").write_text("images\\b.png\n")
        describe(tmp_path / "data.yaml", names=names, train="train.txt", val=["val.txt"])
    else:
        image(tmp_path / "images" / "train" / "a.jpg")
        image(tmp_path / "images" / "valid" / "b.png")
        options = {"classes": NAMES}
    source = Yolo(str(tmp_path), **options)
    assert source.splits == ("train", "val")
    assert boxes(source, "train") == {"a.jpg": EXPECTED}
    assert boxes(source, "val") == {"b.png": EXPECTED}
    assert source.read_split("val")[0] == ("cat", "dog")


def test_lines_of_boxes_and_polygons(tmp_path: Path) -> None:
    """A polygon gives its bounding box; a repeated line counts once; empty lines and images without labels are fine."""
    polygon = "0 0.1 0.2 0.3 0.1 0.2 0.5"
    image(tmp_path / "images" / "train" / "a.jpg", f"\n{BOX}\r\n{BOX}\n{polygon}\n")
    image(tmp_path / "images" / "train" / "b.jpg", None)
    image(tmp_path / "images" / "train" / "c.jpg", "")
    found = boxes(Yolo(str(tmp_path), classes=NAMES), "train")
    assert found == {
        "a.jpg": [*EXPECTED, [pytest.approx(value) for value in (10.0, 8.0, 30.0, 40.0)] + [1]],
        "b.jpg": [],
        "c.jpg": [],
    }


def test_fractions_are_of_the_upright_image(tmp_path: Path) -> None:
    """A phone's picture, stored turned: 100 x 80 pixels are 80 x 100 as anybody sees them."""
    image(tmp_path / "images" / "train" / "a.jpg", "0 0.5 0.5 1 0.5", orientation=6)
    assert boxes(Yolo(str(tmp_path), classes=NAMES), "train") == {"a.jpg": [[0.0, 25.0, 80.0, 75.0, 1]]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "has class 2, but the data set has the classes 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "has class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "has class 0.5"),
        ("0 50 25 20 10", "expected fractions of the image from 0 to 1, got 50.0"),
        ("0 0.5 0.5 nan 0.1", "expected fractions"),
        ("0 0.5 0.5 0.1", "got 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "got 6 numbers"),
        ("cat 0.5 0.5 0.1 0.1", "expected numbers, got 'cat"),
    ],
)
def test_a_line_that_is_wrong_is_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_line(line, (80, 100), 2)
    file = image(tmp_path / "images" / "train" / "a.jpg", f"{BOX}\n{line}\n")
    _, (record,) = Yolo(str(tmp_path), classes=NAMES).read_split("train")
    assert record.boxes.tolist() == [EXPECTED[0][:4]]
    (fault,) = record.faults
    assert fault.startswith(f"{label_file(file)}: line 2 ")
    assert message in fault


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": None}, "expected class names under 'names'"),
        ({"names": ["cat", "cat"]}, r"the class names \['cat'\] occur twice"),
        ({"names": {1: "cat", 2: "dog"}}, "needs the numbers 0 to 1"),
        ({"nc": 3}, "'nc' is 3, but 'names' lists 2 classes"),
        ({"train": "nowhere"}, "'train' in .*data.yaml is nowhere, but neither"),
        ({"train": None}, "no images of the split 'train'"),
    ],
)
def test_a_description_that_is_wrong_is_named(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    image(tmp_path / "pictures" / "a.jpg")
    describe(tmp_path / "data.yaml", **{"train": "pictures", **content})
    with pytest.raises(DistillError, match=message):
        Yolo(str(tmp_path)).read_split("train")


def test_labels_beside_the_images(tmp_path: Path) -> None:
    file = image(tmp_path / "pictures" / "a.jpg")
    assert label_file(file) == file.with_suffix(".txt")
    describe(tmp_path / "data.yaml", train="pictures", val="pictures")
    assert boxes(Yolo(str(tmp_path / "data.yaml")), "train") == {"a.jpg": EXPECTED}


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="no such folder"):
        Yolo(str(tmp_path / "nowhere")).read_split("train")


def test_the_boxes_of_an_image_above_the_default_limit_of_pixels_are_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("distill.data.yolo.MAX_PIXELS", 100)
    image(tmp_path / "images/train/a.png")
    source = Yolo(str(describe(tmp_path / "data.yaml", train="images/train")))
    data = DetectionData(source, max_pixels=8000, val_fraction=0)
    assert len(data.records("train").boxes) == 1


def test_a_test_folder_that_is_named_but_missing_is_no_split(tmp_path: Path) -> None:
    image(tmp_path / "images/train/a.png")
    source = Yolo(str(describe(tmp_path / "data.yaml", train="images/train", test="../test/images")))
    assert source.splits == ("train",)
    with pytest.raises(DistillError, match=r"'test' in .* is \.\./test/images, but"):
        source.read_split("test")


@pytest.mark.parametrize("content", [{"names": {0: "cat", "x": "dog"}}, {"train": 5}])
def test_values_of_another_type_are_named(content: dict[str, Any], tmp_path: Path) -> None:
    image(tmp_path / "images/train/a.png")
    source = Yolo(str(describe(tmp_path / "data.yaml", **{"train": "images/train"} | content)))
    with pytest.raises(DistillError, match=r"data\.yaml"):
        source.read_split("train")
