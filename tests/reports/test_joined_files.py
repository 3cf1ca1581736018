"""Several COCO files that make one split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.types import DistillError
from helpers.coco_files import boxes_by_file, coco_content, write_coco


def joined(folder: Path, names: list[str], **options: Any) -> DetectionData:
    train = {"annotations": [f"{name}.json" for name in names], "images": options.pop("images", None)}
    return DetectionData(Coco(str(folder), train=train), workers=0, **options)


def test_two_files_whose_image_ids_and_categories_collide(tmp_path: Path) -> None:
    """Classes are matched by name, and no box moves to an image of the other file."""
    other = coco_content("b", 2)
    other["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    write_coco(tmp_path, a=coco_content("a"), b=other)
    data = joined(tmp_path, ["a", "b"])
    assert boxes_by_file(data, "train") == {
        "a0.png": [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)],
        "a1.png": [(1, 3, 2, 25, 14), (2, 4, 2, 27, 14)],
        "a2.png": [(1, 5, 2, 29, 14), (2, 6, 2, 31, 14)],
        "b0.png": [(2, 1, 2, 21, 14), (3, 2, 2, 23, 14)],
        "b1.png": [(2, 3, 2, 25, 14), (3, 4, 2, 27, 14)],
    }
    assert data.classes == ("cat", "dog", "cow")
    assert len(set(data.category_ids.values())) == 3
    truth = data.ground_truth("train")
    names = {image["id"]: Path(image["file_name"]).name for image in truth["images"]}
    assert len(names) == 5
    assert [names[entry["image_id"]] for entry in truth["annotations"]][-4:] == ["b0.png", "b0.png", "b1.png", "b1.png"]
    assert "5 image ids numbered anew" in data.summary[0]


def test_image_ids_that_do_not_collide_stay_as_they_are(tmp_path: Path) -> None:
    other = coco_content("b")
    for entry in other["images"]:
        entry["id"] += 10
    for entry in other["annotations"]:
        entry["image_id"] += 10
    write_coco(tmp_path, a=coco_content("a"), b=other)
    data = joined(tmp_path, ["a", "b"])
    assert data.records("train").ids.tolist() == [1, 2, 3, 11, 12, 13]
    assert "anew" not in data.summary[0]


@pytest.mark.parametrize("images", [None, ["first/pictures", "second"]])
def test_a_folder_for_each_file(tmp_path: Path, images: list[str] | None) -> None:
    """The files name their images alike."""
    for name, split, place in (("first", "a", "first/pictures"), ("second", "a", "second")):
        (tmp_path / name).mkdir()
        write_coco(tmp_path / name, **{split: coco_content(split)})
        (tmp_path / place).mkdir(exist_ok=True)
        for file in (tmp_path / name).glob("*.png"):
            content = file.read_bytes() + (b"" if name == "first" else b"another")
            file.unlink()
            (tmp_path / place / file.name).write_bytes(content)
    data = joined(tmp_path, ["first/a", "second/a"], images=images)
    files = [Path(file).relative_to(tmp_path).as_posix() for file in data.records("train").files.texts()]
    assert files == [f"{folder}/a{number}.png" for folder in ("first/pictures", "second") for number in range(3)]
    with pytest.raises(
        DistillError, match=r"data\.source\.train\.images: expected one folder, or one for each of the 2"
    ):
        joined(tmp_path, ["first/a", "second/a"], images=["a", "b", "c"]).records("train")


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_an_image_that_two_files_list(tmp_path: Path, copied: bool, equal: bool) -> None:
    """The same path or a copy of the file: with equal boxes it counts once, else the boxes are in doubt."""
    other = coco_content("b", 2)
    name = "copy.png" if copied else "a0.png"
    other["images"][0]["file_name"] = name
    if not equal:
        other["annotations"][0]["bbox"] = [5, 5, 10, 10]
    write_coco(tmp_path, a=coco_content("a"), b=other)
    (tmp_path / name).write_bytes((tmp_path / "a0.png").read_bytes())
    data = joined(tmp_path, ["a", "b"])
    if equal:
        assert sorted(boxes_by_file(data, "train")) == ["a0.png", "a1.png", "a2.png", "b1.png"]
        assert "1 images listed twice with the same boxes" in data.summary[0]
    else:
        with pytest.raises(
            DistillError, match=r"a0\.png: this image is listed twice, in .*a\.json and in .*b\.json; list"
        ):
            data.records("train")
        skipped = joined(tmp_path, ["a", "b"], on_error="skip")
        assert sorted(boxes_by_file(skipped, "train")) == ["a1.png", "a2.png", "b1.png"]


def test_faults_of_joined_files_name_their_file(tmp_path: Path) -> None:
    other = coco_content("b")
    other["annotations"][0]["bbox"] = [1, 2, "x", 4]
    write_coco(tmp_path, a=coco_content("a"), b=other)
    with pytest.raises(
        DistillError, match=r"train: 1 problems(?s:.)*b\.json: annotations\[0\] needs numbers in 'bbox'"
    ):
        joined(tmp_path, ["a", "b"]).records("train")
    assert len(joined(tmp_path, ["a", "b"], on_error="skip").records("train").labels) == 11


def test_joined_training_files_and_a_val_file(tmp_path: Path) -> None:
    """The classes are those of both files of train, so val may use any of them."""
    other, val = coco_content("b"), coco_content("val")
    other["categories"] = val["categories"] = [{"id": 1, "name": "cow"}, {"id": 2, "name": "cat"}]
    write_coco(tmp_path, a=coco_content("a"), b=other, val=val)
    files: dict[str, Any] = {"train": {"annotations": ["a.json", "b.json"]}, "val": {"annotations": "val.json"}}
    data = DetectionData(Coco(str(tmp_path), **files), workers=0)
    data.setup("fit")
    assert data.classes == ("cat", "dog", "cow")
    assert boxes_by_file(data, "val")["val0.png"] == [(3, 1, 2, 21, 14), (1, 2, 2, 23, 14)]
    assert json.loads(json.dumps(data.category_ids)) == {"1": 2, "2": 3, "3": 1}
