import json
import os
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.checks import check_records
from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.records import coco_ground_truth
from distill.types import DistillError

BIG = 2**62 + 1
RLE = {"counts": [0, 10, 790], "size": [20, 40]}


def content(**changes) -> dict:
    """Two images, 40 x 20, of three; ids from 0, with gaps and of 64 bits; one crowd; one category without boxes."""
    images = [{"id": BIG, "file_name": "b.png", "height": 20, "width": 40}, {"id": 0, "file_name": "a.png"}]
    images += [{"id": 7, "file_name": "sub/c.png", "height": 20, "width": 40}]
    annotations = [
        {"id": BIG, "image_id": BIG, "category_id": 90, "bbox": [1, 2, 10, 5], "area": 17.5, "iscrowd": 0},
        {"id": 0, "image_id": 0, "category_id": 0, "bbox": [0.5, 0, 4, 4], "segmentation": [[0, 0, 4, 0, 4, 4]]},
        {
            "id": 3,
            "image_id": BIG,
            "category_id": 0,
            "bbox": [0, 0, 40, 20],
            "iscrowd": 1,
            "segmentation": RLE,
            "area": 1,
        },
    ]
    names = {90: "zebra", 0: "person", 13: "never seen"}
    categories = [{"id": number, "name": name} for number, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories} | changes


def write(folder, data, images=True) -> Coco:
    (folder / "sub").mkdir(exist_ok=True)
    if images:
        for name in ("a.png", "b.png", "sub/c.png"):
            Image.new("RGB", (40, 20), (9, sum(map(ord, name)) % 256, 9)).save(folder / name)
    (folder / "train.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return Coco(str(folder), {"annotations": "train.json"})


def faults(folder, data) -> list[str]:
    return [fault for record in write(folder, data, images=False).read_split("train")[1] for fault in record.faults]


def entry(**changes) -> dict:
    return {"id": 50, "image_id": 0, "category_id": 0, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0} | changes


def test_ids_of_all_kinds_arrive(tmp_path):
    classes, records = write(tmp_path, content()).read_split("train")
    assert classes == ("person", "never seen", "zebra")
    found = {record.id: record for record in records}
    assert set(found) == {0, 7, BIG}
    assert found[BIG].labels.tolist() == [3, 1]
    assert found[BIG].crowd.tolist() == [False, True]
    assert found[BIG].boxes.tolist() == [[1, 2, 11, 7], [0, 0, 40, 20]]
    assert found[BIG].area.tolist() == [17.5, 1]
    assert found[0].area.tolist() == [16]
    assert found[7].boxes.shape == (0, 4)
    assert found[0].size is None
    assert not any(record.faults for record in records)


def test_labels_map_back_to_the_files_ids(tmp_path):
    source = write(tmp_path, content())
    source.read_split("train")
    assert source.category_ids == {1: 0, 2: 13, 3: 90}


def test_the_order_of_entries_changes_nothing(tmp_path):
    def seen(data):
        classes, records = write(tmp_path, data, images=False).read_split("train")
        rows = [(r.id, r.file, sorted(zip(map(tuple, r.boxes), r.labels, r.crowd, strict=True))) for r in records]
        return classes, sorted(rows)

    base = content()
    for order in permutations(range(3)):
        shuffled = {key: [entries[index] for index in order] for key, entries in base.items()}
        assert seen(shuffled) == seen(base)


def test_ground_truth_is_the_file_again_in_our_labels(tmp_path):
    source = write(tmp_path, content())
    classes, records = source.read_split("train")
    records, _ = check_records(records, "train")
    truth = coco_ground_truth(records, classes)
    wanted = sorted(content()["annotations"], key=lambda entry: (entry["image_id"], entry["bbox"]))
    got = sorted(truth["annotations"], key=lambda entry: (entry["image_id"], entry["bbox"]))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours["image_id"] == theirs["image_id"]
        assert source.category_ids[ours["category_id"]] == theirs["category_id"]
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-12)
        assert ours["area"] == theirs.get("area", 16)
        assert ours["iscrowd"] == theirs.get("iscrowd", 0)
        assert ours.get("segmentation") == theirs.get("segmentation")
    assert [category["id"] for category in truth["categories"]] == [1, 2, 3]
    assert all((image["height"], image["width"]) == (20, 40) for image in truth["images"])
    assert len({note["id"] for note in truth["annotations"]}) == 3
    assert min(note["id"] for note in truth["annotations"]) > 0
    json.dumps(truth)


def test_boxes_are_measured_as_annotated_and_trained_on_clipped(tmp_path):
    notes = [entry(bbox=[-5, 3, 60, 4], area=11), entry(id=51, image_id=7, bbox=[3, 3, 2, 2])]
    notes += [entry(id=52, bbox=[3, 3, 0, 2])]  # dropped, between two that stay
    notes += [entry(id=53, bbox=[30, 10, 20, 20], segmentation=RLE, area=2)]
    write(tmp_path, content(annotations=notes))
    data = DetectionData(Coco(str(tmp_path), {"annotations": "train.json"}), 2, workers=0, min_size=20, max_size=40)
    truth = [note for note in data.ground_truth("train")["annotations"] if note["image_id"] == 0]
    assert [note["bbox"] for note in truth] == [[-5, 3, 60, 4], [30, 10, 20, 20]]
    assert [note["area"] for note in truth] == [11, 2]
    assert [note.get("segmentation") for note in truth] == [None, RLE]
    images = data.dataset("train", training=True)
    index = images.ids.tolist().index(0)
    assert images.target(index).boxes.tolist() == [[0, 3, 40, 7], [30, 10, 40, 20]]
    assert "4 boxes, 3 usable, 1 without area, 2 clipped" in data.summary[0]


def test_64_bit_ids_reach_the_batch(tmp_path):
    write(tmp_path, content())
    data = DetectionData(Coco(str(tmp_path), {"annotations": "train.json"}), 1, workers=0, min_size=20, max_size=40)
    assert {number for batch in data.eval_dataloader("train") for number in batch.ids} == {0, 7, BIG}
    assert {len(batch.targets[0].labels) for batch in data.train_dataloader()} == {1}  # the crowd is no target


def test_images_may_lie_in_the_folder_of_the_json_or_in_another(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", content())
    same = Coco(str(tmp_path), {"annotations": "data/train.json"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.json").write_text(json.dumps(content()))
    other = Coco(str(tmp_path), None, {"annotations": "elsewhere/x.json", "images": "data"})
    assert (same.splits, other.splits) == (("train",), ("val",))
    for source, split in ((same, "train"), (other, "val")):
        records, _ = check_records(source.read_split(split)[1], split)
        assert {record.file for record in records} == {
            str(tmp_path / "data" / n) for n in ("a.png", "b.png", "sub/c.png")
        }


def test_a_byte_order_mark_and_whole_floats_are_no_obstacle(tmp_path):
    data = content(annotations=[entry(id=1.0, image_id=0.0, category_id=90.0, iscrowd=False, area=None)])
    records = write(tmp_path, "\ufeff" + json.dumps(data)).read_split("train")[1]
    assert not any(record.faults for record in records)
    note = next(record for record in records if record.id == 0)
    assert (note.labels.tolist(), note.area.tolist()) == ([3], [4])


@pytest.mark.parametrize(
    "value", [None, True, "a0", 0.5, float("nan"), float("inf"), 2**63, 10**400, -(2**63) - 1, [0], {}]
)
@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_ids_that_are_no_integers_are_named(tmp_path, key, value):
    found = faults(tmp_path, content(annotations=[entry(), entry(id=51), entry(id=52) | {key: value}]))
    assert len(found) == 1
    assert f"annotations[2] needs an integer '{key}'" in found[0]
    assert len(found[0]) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox": None}, "needs 'bbox'"),
        ({"bbox": "1234"}, "needs 'bbox'"),
        ({"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "needs 'bbox'"),
        ({"bbox": [1, 2, 3]}, "needs 'bbox'"),
        ({"bbox": [1, 2, 3, 4, 5]}, "needs 'bbox'"),
        ({"bbox": [1, 2, "3", 4]}, "needs numbers in 'bbox', got '3'"),
        ({"bbox": [1, 2, None, 4]}, "needs numbers in 'bbox', got None"),
        ({"bbox": [1, 2, True, 4]}, "needs numbers in 'bbox', got True"),
        ({"area": "12"}, "needs numbers in 'area', got '12'"),
        ({"area": [1]}, "needs numbers in 'area'"),
        ({"iscrowd": "0"}, "needs 'iscrowd' 0 or 1, got '0'"),
        ({"iscrowd": 2}, "needs 'iscrowd' 0 or 1, got 2"),
        ({"image_id": 5}, "image 5, which 'images' does not list"),
        ({"category_id": 1}, "category 1, which 'categories' does not list"),
    ],
)
def test_a_wrong_annotation_is_named_with_file_and_place(tmp_path, change, words):
    data = content(annotations=[entry(id=1), entry(id=2) | change, entry(id=3)])
    found = faults(tmp_path, data)
    assert len(found) == 1
    assert found[0].startswith(f"{tmp_path / 'train.json'}: annotations[1] ")
    assert words in found[0]
    source = write(tmp_path, data)
    with pytest.raises(DistillError, match=r"annotations\[1\](?s:.)*on_error=skip"):
        check_records(source.read_split("train")[1], "train")
    records, line = check_records(source.read_split("train")[1], "train", "skip")
    assert sum(len(record.labels) for record in records) == 2
    assert str(line) == "train: 3 images, 2 boxes, 2 usable, 2 images without boxes, 1 problems skipped"


@pytest.mark.parametrize("note", [None, 3, "text", [], [1, 2]])
def test_an_annotation_that_is_no_object_is_named(tmp_path, note):
    assert "annotations[1] needs an integer 'image_id'" in faults(tmp_path, content(annotations=[entry(), note]))[0]


@pytest.mark.parametrize(
    ("box", "area", "words"),
    [
        ("[NaN, 1, 2, 2]", "4", "not finite"),
        ("[1, 1, Infinity, 2]", "4", "not finite"),
        ("[1e308, 1, 1e308, 2]", "4", "not finite"),
        ("[1, 1, 1" + "0" * 400 + ", 2]", "4", "not finite"),
        ("[1, 1, 2, 2]", "NaN", "not finite"),
        ("[5, 1, -3, 2]", "4", "ends before it begins"),
        ("[5, 1, 3, -2]", "4", "ends before it begins"),
    ],
)
def test_an_impossible_box_is_named_with_its_place_in_the_file(tmp_path, box, area, words):
    wrong = json.dumps(entry(id=77, bbox="BOX", area="AREA")).replace('"BOX"', box).replace('"AREA"', area)
    text = json.dumps(content()).replace('"annotations": [', f'"annotations": [{json.dumps(entry())}, {wrong}, ')
    source = write(tmp_path, text)
    with pytest.raises(DistillError, match=words) as caught:
        check_records(source.read_split("train")[1], "train")
    assert f"{tmp_path / 'train.json'}: annotation 1 of a.png" in str(caught.value)
    records, line = check_records(source.read_split("train")[1], "train", "skip")
    assert sum(len(record.labels) for record in records) == 4
    assert str(line).endswith("1 problems skipped")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"id": None, "file_name": "a.png"}, "images[3] needs an integer 'id', got None"),
        ({"id": "a8", "file_name": "a.png"}, "images[3] needs an integer 'id', got 'a8'"),
        ({"id": False, "file_name": "a.png"}, "images[3] needs an integer 'id', got False"),
        ({"id": 8, "file_name": None}, "images[3] needs a text 'file_name', got None"),
        ({"id": 8}, "images[3] needs a text 'file_name', got None"),
        ({"id": 8, "file_name": ["a.png"]}, "images[3] needs a text 'file_name'"),
        ({"id": 8, "file_name": "x.png", "height": "20", "width": 40}, "images[3] needs an integer 'height', got '20'"),
        ({"id": 8, "file_name": "x.png", "height": 20, "width": [40]}, "images[3] needs an integer 'width'"),
        (None, "images[3] needs an integer 'id', got None"),
        ("a.png", "images[3] needs an integer 'id', got 'a.png'"),
    ],
)
def test_a_wrong_image_entry_is_named(tmp_path, image, words):
    found = faults(tmp_path, content(images=[*content()["images"], image]))
    assert len(found) == 1
    assert words in found[0]


def test_two_images_with_one_id_are_refused_and_both_left_out_as_their_boxes_cannot_be_told_apart(tmp_path):
    images = [*content()["images"], {"id": 0, "file_name": "sub/c.png"}]
    source = write(tmp_path, content(images=images))
    with pytest.raises(DistillError, match=r"images\[3\] \(sub/c.png\) has id 0 again, as a.png has"):
        check_records(source.read_split("train")[1], "train")
    records, line = check_records(source.read_split("train")[1], "train", "skip")
    assert {record.id for record in records} == {7, BIG}
    assert "2 problems skipped" in str(line)  # the entry, and the annotation of image 0


def test_an_image_listed_twice_with_the_same_id_stays_once(tmp_path):
    source = write(tmp_path, content(images=[*content()["images"], content()["images"][0]]))
    records, _ = check_records(source.read_split("train")[1], "train", "skip")
    assert sorted(record.id for record in records) == [0, 7, BIG]


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        ([], "no classes"),
        (None, "a list 'categories'"),
        ({}, "a list 'categories'"),
        ([{"id": 1}], r"categories\[0\] needs a text 'name'"),
        ([{"name": "a"}], r"categories\[0\] needs an integer 'id'"),
        ([{"id": True, "name": "a"}], r"categories\[0\] needs an integer 'id', got True"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], r"categories\[1\] has id 1"),
        ([7], r"categories\[0\] needs an integer 'id', got 7"),
    ],
)
def test_wrong_categories_are_refused(tmp_path, categories, words):
    with pytest.raises(DistillError, match=words):
        write(tmp_path, content(categories=categories)).read_split("train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ('{"images": [', "cannot be read as JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("[]", "a list 'images'"),
        ("3", "a list 'images'"),
        ('{"annotations": []}', "a list 'images'"),
        ('{"images": {}, "annotations": [], "categories": []}', "a list 'images'"),
        ('{"images": [], "annotations": null, "categories": []}', "a list 'annotations'"),
        ('{"images": [], "categories": []}', "no 'annotations'.*data.source.train=null"),
    ],
)
def test_what_is_not_cocos_form_is_refused(tmp_path, text, words):
    with pytest.raises(DistillError, match=words):
        write(tmp_path, text).read_split("train")


def test_bytes_that_are_no_text_and_files_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00\x80")
    for name, words in (("x.json", "cannot be read"), ("y.json", "no such annotation file"), (".", "cannot be read")):
        with pytest.raises(DistillError, match=words):
            Coco(str(tmp_path), {"annotations": name}).read_split("train")


@pytest.mark.parametrize("files", ["train.json", ["train.json"], {"annotation": "train.json"}])
def test_a_split_given_in_another_form_is_refused(tmp_path, files):
    with pytest.raises(DistillError, match=r"data\.source\.val\.annotations"):
        Coco(str(tmp_path), None, files)


def test_splits_that_are_not_configured_are_refused(tmp_path):
    source = Coco(str(tmp_path), {"annotations": None, "images": "x"})
    assert source.splits == ()
    for split in ("train", "val", "other"):
        with pytest.raises(DistillError, match=f"no split '{split}'"):
            source.read_split(split)


@pytest.mark.parametrize("changes", [{"images": [], "annotations": []}, {"annotations": []}])
def test_a_split_without_images_or_without_boxes_is_refused(tmp_path, changes):
    with pytest.raises(DistillError, match=r"empty|no usable box"):
        check_records(write(tmp_path, content(**changes)).read_split("train")[1], "train")


@pytest.mark.parametrize(("split", "boxes"), [("train", 470), ("val", 382)])
def test_real_coco_images(split, boxes):
    root = os.environ.get("DISTILL_TEST_DATA")
    if not root:
        pytest.skip("set DISTILL_TEST_DATA to the folder that holds tiny_coco")
    name = f"annotations/instances_{split}2017.json"
    files = {"annotations": name, "images": f"{split}2017"}
    source = Coco(f"{root}/tiny_coco", **{split: files})
    classes, records = source.read_split(split)
    records, line = check_records(records, split)
    assert sum(len(record.labels) for record in records) == boxes
    assert sum(int(record.crowd.sum()) for record in records) == 5
    assert f"{boxes} boxes, {boxes} usable" in str(line)
    assert "5 crowds" in str(line)
    with open(f"{root}/tiny_coco/{name}") as file:
        raw = json.load(file)
    notes = {(note["image_id"], *np.round(note["bbox"], 6)): note for note in raw["annotations"]}
    truth = coco_ground_truth(records, classes)
    assert len(truth["images"]) == len(raw["images"])
    for note in truth["annotations"]:
        theirs = notes[(note["image_id"], *np.round(note["bbox"], 6))]
        assert source.category_ids[note["category_id"]] == theirs["category_id"]
        assert (note["area"], note["iscrowd"]) == (theirs["area"], theirs["iscrowd"])
        assert note["segmentation"] == theirs["segmentation"]
    for record in records:
        height, width = record.size
        assert (record.boxes[:, 2:] <= [width, height]).all()
        assert (record.boxes >= 0).all()


def test_targets_are_tensors_of_the_promised_types(tmp_path):
    write(tmp_path, content())
    data = DetectionData(Coco(str(tmp_path), {"annotations": "train.json"}), 3, workers=0, min_size=20, max_size=40)
    (batch,) = data.eval_dataloader("train")
    assert all(target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64 for target in batch.targets)


@pytest.mark.parametrize("folder", ["", "images", "train2017", "annotations"])
def test_images_are_found_where_they_usually_lie(tmp_path, folder):
    (tmp_path / "annotations").mkdir()
    write(tmp_path, content(), images=False)
    (tmp_path / "train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    (tmp_path / folder / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (40, 20)).save(tmp_path / folder / name)
    source = Coco(str(tmp_path), {"annotations": "annotations/instances_train2017.json"})
    assert {record.file for record in check_records(source.read_split("train")[1], "train")[0]} == {
        str(tmp_path / folder / name) for name in ("a.png", "b.png", "sub/c.png")
    }


def test_category_ids_are_the_files_own_whoever_asks_first(tmp_path):
    source = write(tmp_path, content())
    assert DetectionData(source, workers=0).category_ids == {1: 0, 2: 13, 3: 90}
