"""Categories of COCO files: groups, splits that differ, spellings, and crowds."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from distill.types import DistillError
from helpers.coco_files import boxes_by_file, coco_content, coco_data, write_coco

TRAIN = coco_content()


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("number", [0, 9])
def test_a_group_of_categories_with_the_name_of_a_class(tmp_path: Path, place: int, number: int) -> None:
    content = coco_content()
    content["categories"].insert(place, {"id": number, "name": "dog", "supercategory": "none"})
    write_coco(tmp_path, train=content)
    data = coco_data(tmp_path, "train")
    assert data.classes == ("cat", "dog")
    assert data.category_ids == {1: 1, 2: 2}
    assert boxes_by_file(data, "train")["train0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert "1 unused categories of a repeated name dropped" in data.summary[0]


def test_two_categories_of_one_name_without_boxes(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"] += [{"id": 3, "name": "cow"}, {"id": 4, "name": "cow"}]
    write_coco(tmp_path, train=content)
    assert coco_data(tmp_path, "train").classes == ("cat", "dog", "cow")


def test_two_categories_of_one_name_that_both_have_boxes(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"].append({"id": 3, "name": "dog"})
    content["annotations"][0]["category_id"] = 3
    write_coco(tmp_path, train=content)
    with pytest.raises(
        DistillError, match=r"categories\[2\] has the name 'dog', as id 2 has, and both have annotations"
    ):
        coco_data(tmp_path, "train").records("train")


def test_val_with_fewer_categories(tmp_path: Path) -> None:
    val = coco_content("val")
    val["annotations"] = [entry for entry in val["annotations"] if entry["category_id"] == 2]
    val["categories"] = [{"id": 2, "name": "dog"}]
    write_coco(tmp_path, train=TRAIN, val=val)
    for order in (("train", "val"), ("val", "train")):
        data = coco_data(tmp_path, "train", "val")
        for split in order:
            data.records(split)
        assert data.classes == ("cat", "dog")
        assert boxes_by_file(data, "val")["val0.png"] == [(2, 2, 2, 23, 14)]
        assert [entry["name"] for entry in data.ground_truth("val")["categories"]] == ["cat", "dog"]


def test_val_with_other_ids_in_another_order(tmp_path: Path) -> None:
    val = coco_content("val")
    val["categories"] = [{"id": 1, "name": "dog"}, {"id": 5, "name": "cat"}]
    for annotation in val["annotations"]:
        annotation["category_id"] = {1: 5, 2: 1}[annotation["category_id"]]
    write_coco(tmp_path, train=TRAIN, val=val)
    data = coco_data(tmp_path, "train", "val")
    assert boxes_by_file(data, "val")["val0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert data.category_ids == {1: 5, 2: 1}
    assert boxes_by_file(data, "train")["train0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]


def test_val_with_boxes_of_a_class_that_train_lacks(tmp_path: Path) -> None:
    val = coco_content("val")
    val["categories"][1]["name"] = "horse"
    write_coco(tmp_path, train=TRAIN, val=val)
    data = coco_data(tmp_path, "train", "val")
    data.records("train")
    with pytest.raises(DistillError, match=r"val\.json: has boxes of the classes horse, which train lacks.*cat, dog"):
        data.records("val")
    measured = coco_data(tmp_path, "train", "val")  # for a model that may know other classes than train
    assert boxes_by_file(measured, "val")["val0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert measured.classes == ("cat", "horse")


def test_val_that_lists_a_class_without_boxes_that_train_lacks(tmp_path: Path) -> None:
    val = coco_content("val")
    val["categories"].insert(0, {"id": 0, "name": "animals"})
    write_coco(tmp_path, train=TRAIN, val=val)
    data = coco_data(tmp_path, "train", "val")
    assert boxes_by_file(data, "val")["val0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert data.classes == ("cat", "dog")


def test_val_alone_where_the_file_of_train_is_absent(tmp_path: Path) -> None:
    write_coco(tmp_path, val=coco_content("val"))
    data = coco_data(tmp_path, "train", "val")
    assert boxes_by_file(data, "val")["val0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]


def test_names_that_differ_in_case_or_spaces_alone(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"] += [{"id": 3, "name": "Dog"}, {"id": 4, "name": " dog"}, {"id": 5, "name": "cow"}]
    write_coco(tmp_path, train=content)
    with pytest.warns(UserWarning, match="case or spaces alone are different classes: 'dog', 'Dog', ' dog'"):
        coco_data(tmp_path, "train").records("train")
    write_coco(tmp_path, train=TRAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coco_data(tmp_path, "train").records("train")


def test_every_annotation_is_a_crowd(tmp_path: Path) -> None:
    crowds = {split: coco_content(split) for split in ("train", "val")}
    for content in crowds.values():
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1
    write_coco(tmp_path, **crowds)
    data = coco_data(tmp_path, "train", "val")
    with pytest.raises(DistillError, match=r"of 6 boxes, 6 are crowds \(iscrowd=1\), which are no training targets"):
        data.train_dataloader()
    with pytest.warns(UserWarning, match=r"val: all 6 boxes are crowds \(iscrowd=1\)"):
        data.records("val")
