"""Folders of images as users have them, for the verb predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from distill.cli.commands.predict import find_images, picture_name
from distill.types import DistillError
from helpers.runs import Cli


def picture(file: Path, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((48, 40), 90).convert("RGB").save(file, **options)
    return file


def test_a_cut_image_among_good_ones(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [picture(tmp_path / "images" / f"{name}.jpg") for name in "abc"]
    names[1].write_bytes(names[1].read_bytes()[:300])
    picture(tmp_path / "images" / "d.gif", format="GIF")
    picture(tmp_path / "images" / "e.jfif", format="JPEG")
    (tmp_path / "images" / "notes.txt").write_text("x")
    assert cli(["predict", str(tiny_teacher), "images", "--out", "images/found"]) == 0
    said = capsys.readouterr()
    assert "left out: images/b.jpg: cannot be read as an image" in said.err
    assert "detections in 4 images" in said.out
    assert "1 of 5 images could not be read" in said.out
    assert "1 files were skipped, because their extension is not that of an image: 1 .txt" in said.out
    found = tmp_path / "images" / "found"
    listed = json.loads((found / "images.json").read_text())
    assert [(image["id"], image["file_name"]) for image in listed["images"]] == [
        (0, "images/a.jpg"),
        (2, "images/c.jpg"),
        (3, "images/d.gif"),
        (4, "images/e.jfif"),
    ]
    assert [failed["file_name"] for failed in listed["failed"]] == ["images/b.jpg"]
    assert {row["image_id"] for row in json.loads((found / "detections.json").read_text())} <= {0, 2, 3, 4}
    assert len(list(found.glob("*.png"))) == 4
    # a second run does not take its own pictures for images
    assert [file.name for file in find_images([tmp_path / "images"], found)[0]] == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "d.gif",
        "e.jfif",
    ]


def test_images_of_a_coco_file_are_scored_by_pycocotools(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids of images and classes that are those of the file: the boxes of a first call are its ground truth."""
    # cocodataset/cocoapi#497, WongKinYiu/yolov9#466
    for folder, name in (("a", "1.jpg"), ("b", "1.jpg"), ("b", "new.jpg")):
        picture(tmp_path / "images" / folder / name)
    assert cli(["predict", str(tiny_teacher), "images", "--out", "first", "--device", "cpu"]) == 0
    first = json.loads(Path("first/detections.json").read_text())
    classes = json.loads(Path("first/images.json").read_text())["categories"]
    new_ids = {row["id"]: 90 - 7 * number for number, row in enumerate(classes)}
    absent = classes.pop()["id"]  # a class that the file does not have
    truth = {
        "images": [
            {"id": 42, "file_name": "b/1.jpg", "width": 48, "height": 40},
            {"id": 17, "file_name": "a/1.jpg", "width": 48, "height": 40},
        ],
        "categories": [{"id": new_ids[row["id"]], "name": row["name"]} for row in classes],
        "annotations": [
            {"id": number, "image_id": {0: 17, 1: 42}[row["image_id"]], "category_id": new_ids[row["category_id"]]}
            | {"bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for number, row in enumerate(first, 1)
            if row["image_id"] < 2 and row["category_id"] != absent
        ],
    }
    Path("truth.json").write_text(json.dumps(truth))
    capsys.readouterr()
    words = ["predict", str(tiny_teacher), "images", "--out", "second", "--annotations", "truth.json"]
    assert cli(words) == 0
    assert "1 images are not listed in truth.json and were left out, the first: images/b/new.jpg" in (
        capsys.readouterr().out
    )
    evaluation = COCOeval(COCO("truth.json"), COCO("truth.json").loadRes("second/detections.json"), "bbox")
    evaluation.params.maxDets = [1, 10, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    assert precision[precision > -1].mean() == pytest.approx(1.0)
    assert [row["name"] for row in json.loads(Path("second/images.json").read_text())["categories"]] == [
        row["name"] for row in classes
    ]


def test_annotations_of_other_images(cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(Path("a.jpg"))
    for content, message in (
        ({"images": [], "categories": []}, "none of the 1 images is listed there, the first: a.jpg"),
        ({"images": [{"id": 1}]}, "expected COCO's format, with 'images' (id, file_name)"),
    ):
        Path("other.json").write_text(json.dumps(content))
        assert cli(["predict", str(tiny_teacher), "a.jpg", "--annotations", "other.json"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "1.5"], "--score 1.5: expected a score from 0 to 1"),
        (["--score", "nan"], "--score nan: expected a score from 0 to 1"),
        (["--device", "gpu7"], "--device gpu7: expected cpu, cuda, cuda:1 or mps"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds"),
    ],
)
def test_values_that_cannot_be(words: list[str], message: str, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["predict", "RUN", "a.jpg", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_of_nothing_but_cut_images(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 no more")
    assert cli(["predict", str(tiny_teacher), "a.jpg"]) == 1
    assert "none of the 1 images can be read, the first: a.jpg: " in capsys.readouterr().err
    assert not list((tmp_path / "outputs").rglob("*.json"))


@pytest.mark.parametrize("stem", ["n" * 251, "ü" * 125, "bild"])
def test_a_name_as_long_as_the_file_system_allows(stem: str, tmp_path: Path) -> None:
    name = picture_name(7, Path(f"{stem}.jpg"))
    (tmp_path / f"{name}.part").touch()  # as it is written
    assert name.startswith("000007-")
    assert stem.startswith(name.removeprefix("000007-").removesuffix(".png"))


def test_hidden_files_and_folders(tmp_path: Path) -> None:
    """Of macOS and of notebooks."""
    for name in ("a.PNG", "._a.png", ".ipynb_checkpoints/b.png", "sub/c.webp"):
        picture(tmp_path / ".data" / name)
    files, ignored = find_images([tmp_path / ".data"], tmp_path / "out")
    assert [file.name for file in files] == ["a.PNG", "c.webp"]
    assert not ignored


@pytest.mark.parametrize("out", ["images", "."])
def test_predictions_written_among_the_images(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "images" / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match="Choose another folder for --out"):
        find_images([Path("images")], Path(out))
    assert find_images([Path("images/a.png")], Path(out))[0] == [Path("images/a.png")]
