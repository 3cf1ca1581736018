"""Categories of COCO files: groups, splits that differ, spellings, and crowds."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest

from distill.cli.config.overrides import parse_overrides
from distill.data.datamodule import DetectionData
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
    content["annotations"][1]["category_id"], content["annotations"][3]["category_id"] = 3, 4
    write_coco(tmp_path, train=content)
    with pytest.warns(UserWarning, match="case or spaces alone are different classes: 'dog', 'Dog', ' dog'") as caught:
        coco_data(tmp_path, "train").records("train")
    (word,) = shlex.split(str(caught[0].message).partition("merge them: ")[2])
    (override,) = parse_overrides([word])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = coco_data(tmp_path, "train", source_options={"rename": override.value()})
        assert boxes_by_file(merged, "train")["train0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert merged.classes == ("cat", "dog", "cow")
    assert merged.category_ids == {1: 1, 2: 2, 3: 5}


def choose(folder: Path, *splits: str, choice: dict[str, Any], **options: Any) -> DetectionData:
    return coco_data(folder, *splits, source_options=choice, **options)


def test_a_part_of_the_classes_in_another_order(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"].append({"id": 7, "name": "cow"})
    content["annotations"][2]["category_id"] = content["annotations"][3]["category_id"] = 7
    content["annotations"][4]["iscrowd"] = 1
    write_coco(tmp_path, train=content, val=coco_content("val"))
    data = choose(tmp_path, "train", "val", choice={"classes": ["cow", "dog"]})
    assert boxes_by_file(data, "train") == {
        "train0.png": [(2, 2, 2, 23, 14)],
        "train1.png": [(1, 3, 2, 25, 14), (1, 4, 2, 27, 14)],
        "train2.png": [(2, 6, 2, 31, 14)],
    }
    assert (data.classes, data.category_ids) == (("cow", "dog"), {1: 7, 2: 2})
    assert "4 usable, 2 boxes of other classes dropped" in data.summary[0]  # the crowd of a cat is one of them
    assert boxes_by_file(data, "val")["val0.png"] == [(2, 2, 2, 23, 14)]  # val lists no cow
    assert data.category_ids[2] == 2


def test_images_that_only_have_boxes_of_other_classes(tmp_path: Path) -> None:
    """Training leaves them out, or keeps them on request. Evaluation keeps them: detections on them are wrong."""
    content = coco_content()
    content["annotations"][0]["category_id"] = 2
    content["annotations"] = content["annotations"][:2] + [
        entry | {"category_id": 1} for entry in content["annotations"][2:]
    ]
    write_coco(tmp_path, train=content, val=content | coco_content("val"))
    choice = {"classes": ["dog"]}
    data = choose(tmp_path, "train", "val", choice=choice)
    assert len(data.dataset("train", training=True)) == 1
    assert len(data.dataset("val", training=False)) == len(data.ground_truth("val")["images"]) == 3
    assert "2 images without boxes" in data.summary[0]
    kept = choose(tmp_path, "train", choice=choice, keep_empty=True)
    assert len(kept.dataset("train", training=True)) == 3


def test_val_with_boxes_of_a_class_that_is_not_chosen(tmp_path: Path) -> None:
    val = coco_content("val")
    val["categories"] = [{"id": 1, "name": "horse"}, {"id": 4, "name": "dog"}]
    for annotation in val["annotations"]:
        annotation["category_id"] = {1: 1, 2: 4}[annotation["category_id"]]
    write_coco(tmp_path, train=TRAIN, val=val)
    data = choose(tmp_path, "train", "val", choice={"classes": ["dog"]})
    assert boxes_by_file(data, "train")["train0.png"] == [(1, 2, 2, 23, 14)]
    assert boxes_by_file(data, "val")["val0.png"] == [(1, 2, 2, 23, 14)]
    renamed = choose(tmp_path, "train", "val", choice={"rename": {"horse": "cat"}})  # a name of val alone
    assert boxes_by_file(renamed, "train")["train0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert boxes_by_file(renamed, "val")["val0.png"] == [(1, 1, 2, 21, 14), (2, 2, 2, 23, 14)]
    assert (renamed.classes, renamed.category_ids) == (("cat", "dog"), {1: 1, 2: 4})


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            {"classes": ["dgo"]},
            r"data\.source\.classes: .*train\.json has no class 'dgo'.*cat, dog; did you mean 'dog'",
        ),
        ({"rename": {"Dog": "dog"}}, r"data\.source\.rename: .*has no class 'Dog'"),
        ({"rename": {"dog": "cow"}, "classes": ["dog"]}, r"has no class 'dog' after data\.source\.rename.*cat, cow"),
    ],
)
def test_names_that_the_file_does_not_have(tmp_path: Path, choice: dict[str, Any], words: str) -> None:
    write_coco(tmp_path, train=TRAIN)
    with pytest.raises(DistillError, match=words):
        choose(tmp_path, "train", choice=choice).records("train")


def test_other_classes_are_other_data(tmp_path: Path) -> None:
    """A checkpoint, a measured AP and a cached teacher of other classes are not taken for this data's."""
    write_coco(tmp_path, train=TRAIN, val=coco_content("val"))
    choices: list[dict[str, Any]] = [{}, {"classes": ["dog"]}, {"classes": ["dog", "cat"]}, {"rename": {"cat": "dog"}}]
    data = [choose(tmp_path, "train", "val", choice=choice) for choice in choices]
    assert len({each.fingerprint("val") for each in data}) == 4
    assert all(each.differences(data[0].state_dict()) for each in data[1:])


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


@pytest.mark.parametrize(
    ("boxed", "groups", "classes"),
    [
        (False, ["none", "cells", "cells"], ["cat", "dog"]),  # Roboflow's class 0
        (True, ["none", "cells", "cells"], ["cells", "cat", "dog"]),  # it has a box
        (False, ["none", "cells", "pets"], ["cells", "cat", "dog"]),  # it groups one class of two
        (False, ["cells", "cat", "dog"], ["cells", "cat", "dog"]),  # each is a group of its own
        (False, ["none", "none", "none"], ["cells", "cat", "dog"]),
    ],
)
def test_a_class_0_that_only_names_the_group_of_the_others(
    boxed: bool, groups: list[str], classes: list[str], tmp_path: Path
) -> None:
    content = coco_content()
    content["categories"] = [
        {"id": number, "name": name, "supercategory": group}
        for (number, name), group in zip(enumerate(["cells", "cat", "dog"]), groups, strict=True)
    ]
    for place, entry in enumerate(content["annotations"]):
        entry["category_id"] = 0 if boxed and place == 0 else 1
    write_coco(tmp_path, train=content, val=content)
    data = coco_data(tmp_path, "train", "val")
    data.setup("fit")
    assert list(data.classes) == classes
    assert len(data.records("train").labels) == len(content["annotations"])
    named = data.classes[data.records("train").labels[-1] - 1]
    assert named == "cat"
    assert ("class 'cells' dropped, which groups the others and has no box" in data.summary[0]) == (len(classes) == 2)
