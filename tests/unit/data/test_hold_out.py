"""Validation images that are split off the training images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.hold_out import hold_out_images
from distill.types import DistillError
from helpers.image_folders import write_coco


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.2, 20), (10, 0.25, 2), (2, 0.01, 1), (3, 0.99, 2)])
def test_the_part_of_the_images(count: int, fraction: float, expected: int) -> None:
    chosen = hold_out_images([f"/data/{number}.jpg" for number in range(count)], fraction).images
    assert chosen.sum() == expected


def test_the_choice_hangs_on_the_names_alone() -> None:
    """In another folder and order, the same images are chosen; with more images, nearly the same."""
    names = [f"{number}.jpg" for number in range(200)]
    chosen = {name for name, held in zip(names, hold_out_images(names, 0.2).images, strict=True) if held}
    moved = [f"C:/elsewhere/{name}" for name in reversed(names)]
    again = {Path(name).name for name, held in zip(moved, hold_out_images(moved, 0.2).images, strict=True) if held}
    assert again == chosen
    more = [*names, *(f"new{number}.jpg" for number in range(20))]
    later = {name for name, held in zip(more, hold_out_images(more, 0.2).images, strict=True) if held}
    assert len(chosen - later) <= 4


def test_copies_of_one_image_stay_together() -> None:
    """Roboflow writes three augmented copies of an image: one in train and one in val would flatter val."""
    files = [f"img{number}_jpg.rf.{copy}{number}abc.jpg" for number in range(30) for copy in range(3)]
    chosen = hold_out_images(files, 0.2).images.reshape(30, 3)
    assert (chosen.all(1) | ~chosen.any(1)).all()
    assert chosen.sum() == 18


def test_many_copies_of_one_image_are_not_taken_for_a_small_part() -> None:
    files = [f"video.rf.{copy}a.jpg" for copy in range(50)] + [f"single{number}.jpg" for number in range(5)]
    assert hold_out_images(files, 0.02).images.sum() == 1
    assert hold_out_images(files, 0.2).images.nonzero()[0].tolist() == [50, 51, 52, 53, 54]


def test_another_seed_chooses_other_images() -> None:
    files = [f"{number}.jpg" for number in range(100)]
    first, second, again = (hold_out_images(files, 0.2, seed).images for seed in (0, 1, 1))
    assert first.sum() == second.sum() == 20
    assert (second == again).all()
    assert (first & second).sum() < 12


def test_folders_that_name_their_images_alike() -> None:
    """Each folder has the images 0.jpg and 1.jpg. In another place, the same images are chosen."""
    files = [f"/data/day{day}/cam{camera}/{number}.jpg" for day in range(5) for camera in (0, 1) for number in (0, 1)]
    chosen = hold_out_images(files, 0.25).images
    assert chosen.sum() == 5
    moved = hold_out_images([file.replace("/data", "C:/mine/new") for file in files], 0.25).images
    assert (moved == chosen).all()
    assert hold_out_images(["a/x.jpg", "a/x.png", "b/y.jpg"], 0.5).images.tolist() in (
        [False] * 2 + [True],
        [True] * 2 + [False],
    )


def test_images_that_look_alike_stay_together(tmp_path: Path) -> None:
    """Ten scenes of five frames each, whose names say nothing."""
    rng = np.random.default_rng(0)
    files, scenes = [], []
    for scene in range(10):
        blots = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        for frame in range(5):
            files.append(str(tmp_path / f"{rng.integers(10**9)}.jpg"))
            scenes.append(scene)
            blots.resize((160 + frame, 120), Image.Resampling.BICUBIC).save(files[-1])
    held_out = hold_out_images(files, 0.2, similar=True)
    assert sorted(np.bincount(np.array(scenes)[held_out.images], minlength=10).tolist()) == [0] * 8 + [5, 5]
    assert held_out.together == 50
    assert "50 images stay on the same side as similar images" in held_out.describe()
    apart = hold_out_images(files, 0.2)
    assert max(np.bincount(np.array(scenes)[apart.images])) < 5


def test_a_single_scene_is_split_by_names(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{number}.png") for number in range(20)]
    for file in files:
        Image.new("L", (20, 20)).save(file)
    held_out = hold_out_images(files, 0.2, similar=True)
    assert held_out.images.sum() == 4
    assert "most images look alike, so that copies may be on both sides" in held_out.describe()


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    """It is for training; only who asks for validation images gets an error."""
    assert not hold_out_images(["a.rf.1.jpg", "a.rf.2.jpg"], 0.5).images.any()
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][:1]
    first = content["images"][0]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] == first]
    file.write_text(json.dumps(content))
    data = DetectionData(
        Coco(str(tmp_path), train={"annotations": f"annotations/{file.name}"}), workers=0, val_fraction=0.2
    )
    assert len(data.records("train")) == 1
    with pytest.raises(DistillError, match="1 training images are too few to split some off"):
        data.records("val")


def test_a_coco_file_of_training_images_alone(tmp_path: Path) -> None:
    """Both parts are disjoint, hold all boxes, and faults of the file stay with their images."""
    write_coco(tmp_path)
    file = "annotations/instances_train2017.json"
    content = json.loads((tmp_path / file).read_text())
    content["annotations"].append({**content["annotations"][0], "id": 10**6, "bbox": [1, 1, -5, 5]})
    (tmp_path / file).write_text(json.dumps(content))
    data = DetectionData(
        Coco(str(tmp_path), train={"annotations": file}), workers=0, val_fraction=0.25, on_error="skip"
    )
    assert data.splits == ("train", "val")
    data.setup("fit")
    train, val = data.records("train"), data.records("val")
    assert sorted([*train.ids.tolist(), *val.ids.tolist()]) == sorted(image["id"] for image in content["images"])
    assert len(val) == 2
    assert len(train.labels) + len(val.labels) == len(content["annotations"]) - 1
    assert sum(data.checked[split].skipped.get("problems skipped", 0) for split in ("train", "val")) == 1
    boxes = {image["id"]: 0 for image in content["images"]}
    for annotation in content["annotations"][:-1]:
        boxes[annotation["image_id"]] += 1
    for records in (train, val):
        assert records.row_counts().tolist() == [boxes[number] for number in records.ids.tolist()]
        assert np.all(records.sizes == 64)
    (line,) = [line for line in data.summary if "split off" in line]
    assert line.startswith("val: the data has no such split, so 2 of the 8 training images are split off for it")


def test_a_val_split_of_its_own_is_used(tmp_path: Path) -> None:
    write_coco(tmp_path)
    files = {split: {"annotations": f"annotations/instances_{split}2017.json"} for split in ("train", "val")}
    data = DetectionData(Coco(str(tmp_path), **files), workers=0, val_fraction=0.2)
    assert (len(data.records("train")), len(data.records("val"))) == (8, 4)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_part_that_is_none_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"data\.val_fraction: expected a number from 0 to below 1"):
        DetectionData(Coco(str(tmp_path)), val_fraction=fraction)
