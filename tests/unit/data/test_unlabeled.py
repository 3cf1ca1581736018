"""Images without labels: where they come from, which are left out, and the batches that hold them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.sampler import BatchSampler, JointBatchSampler
from distill.data.shapes import Shapes
from distill.types import DistillError
from helpers.image_folders import write_coco
from helpers.training import shapes_data


def drawn(count: int = 6, train: int = 8, **options: Any) -> DetectionData:
    unlabeled = {"images": count, "ratio": 0.5, **options.pop("unlabeled", {})}
    data = shapes_data(source=Shapes(train=train, val=2, test=0, size=64), unlabeled=unlabeled, **options)
    data.setup("fit")
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in two folders, an image of the training set under another name, and a file that is no image."""
    write_coco(tmp_path / "coco")
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 48 + number), (number * 40, 0, 0)).save(images / "more" / f"{number}.png")
    shutil.copy(next((tmp_path / "coco" / "train2017").iterdir()), images / "copy.png")
    shutil.copy(next((tmp_path / "coco" / "val2017").iterdir()), images / "judge.png")
    (images / "notes.txt").write_text("no image")
    return images


def coco(folder: Path, **options: Any) -> DetectionData:
    splits: Any = {name: {"annotations": f"annotations/instances_{name}2017.json"} for name in ("train", "val")}
    data = DetectionData(
        Coco(str(folder.parent / "coco"), **splits),
        **{"batch_size": 2, "workers": 0, "min_size": 64, "max_size": 64, "unlabeled": str(folder), **options},
    )
    data.setup("fit")
    return data


def test_batches_of_labeled_images_stay_the_same() -> None:
    plain = list(shapes_data(source=Shapes(train=8, val=2, test=0, size=64)).train_dataloader())
    joint = list(drawn().train_dataloader())
    assert [batch.ids for batch in joint] == [batch.ids for batch in plain]
    assert all(torch.equal(one.images, other.images) for one, other in zip(joint, plain, strict=True))
    assert [len(batch.unlabeled or ()) for batch in joint] == [2, 2]


def test_drawn_images_are_those_of_a_larger_training_set() -> None:
    data = drawn(3, train=2)
    larger = Shapes(train=5, val=0, test=0, size=64)
    larger.read_split("train")
    records = data.unlabeled_records()
    assert records.ids.tolist() == [2, 3, 4]
    assert not len(records.labels)
    for number, file in zip(records.ids.tolist(), records.files.texts(), strict=True):
        assert torch.equal(data.load_unlabeled(file), larger.load_image(f"shapes/train/{number}"))


def test_targets_are_missing_and_not_empty() -> None:
    batch = next(iter(drawn().train_dataloader())).to("cpu")
    assert batch.unlabeled is not None
    assert batch.unlabeled.targets_missing
    for read in (list, len, lambda targets: targets[0]):
        with pytest.raises(DistillError, match="whose boxes are not known"):
            read(batch.unlabeled.targets)


def test_worker_processes_send_both_parts() -> None:
    here, there = (next(iter(drawn(workers=workers).train_dataloader())) for workers in (0, 1))
    assert there.unlabeled is not None
    assert here.unlabeled is not None
    assert there.unlabeled.targets_missing
    assert torch.equal(here.unlabeled.images, there.unlabeled.images)
    assert there.unlabeled.ids == here.unlabeled.ids


def joint_sampler(rank: int = 0, world: int = 1, size: int = 2, images: int = 7) -> JointBatchSampler:
    return JointBatchSampler(BatchSampler([0] * 12, 4 // world, True, 3, rank, world), [0] * images, size // world)


def others(sampler: JointBatchSampler, epochs: int) -> list[list[int]]:
    """The unlabeled indices of each step."""
    steps = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch, 0)
        steps += [[index - 12 for _, index in keys if index >= 12] for keys in sampler]
    return steps


def test_all_other_images_are_seen_equally_often() -> None:
    steps = others(joint_sampler(images=8), epochs=8)  # 24 steps of 2: 6 passes over 8 images
    assert Counter(index for step in steps for index in step) == dict.fromkeys(range(8), 6)


def test_the_stream_goes_on_where_a_resumed_run_goes_on() -> None:
    whole = others(joint_sampler(), epochs=3)
    resumed = joint_sampler()
    resumed.set_epoch(1, 2)  # 3 steps an epoch
    assert [index - 12 for _, index in next(iter(resumed)) if index >= 12] == whole[5]


def test_two_processes_share_the_batches_of_one() -> None:
    alone = others(joint_sampler(), 2)
    pair = zip(*(others(joint_sampler(rank, 2), 2) for rank in (0, 1)), strict=True)
    assert [set(step) for step in alone] == [{*one, *other} for one, other in pair]


def test_fewer_images_than_in_a_batch_are_all_used() -> None:
    assert [sorted(step) for step in others(joint_sampler(images=3, size=8), 1)] == [[0, 1, 2]] * 3


def test_a_folder_is_searched_and_labeled_images_are_left_out(folder: Path) -> None:
    data = coco(folder)
    assert [Path(file).name for file in data.unlabeled_records().files.texts()] == ["0.png", "1.png", "2.png"]
    assert data.summary[-1] == "unlabeled: 3 images; 1 images of train are left out; 1 images of val are left out"


def test_images_beyond_a_limit_of_training_images_lose_their_labels(folder: Path) -> None:
    root = folder.parent / "coco"
    data = coco(folder, unlabeled=str(root / "train2017"), limit=3)
    files = set(data.unlabeled_records().files.texts())
    assert len(files) == 5
    assert not files & set(data.records("train").files.texts())
    # Evaluation's images stay out, also where only some of them are evaluated.
    with pytest.raises(DistillError, match="all its images are labeled images of val"):
        coco(folder, unlabeled=str(root / "val2017"), limit_eval=1)


def test_a_coco_file_gives_its_images_without_their_boxes(folder: Path) -> None:
    file = folder.parent / "coco" / "annotations" / "instances_train2017.json"
    data = coco(folder, limit=2, unlabeled=str(file))
    assert len(data.unlabeled_records()) == 6
    assert not len(data.unlabeled_records().labels)


def label_file(folder: Path, **entries: Any) -> Path:
    file = folder.parent / "labels.json"
    content = {
        "images": [
            {"id": 1, "file_name": "more/0.png", "height": 48, "width": 64},
            {"id": 2, "file_name": "more/2.png", "height": 50, "width": 64},
        ],
        "categories": [{"id": 7, "name": "star"}, {"id": 9, "name": "horse"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [8, 8, 100, 16], "score": 0.9},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "score": 0.3},
            {"id": 3, "image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9], "score": 0.8},
        ],
    }
    file.write_text(json.dumps(content | entries))
    return file


def test_boxes_of_a_file_are_clipped_and_sorted_by_score_and_class(folder: Path) -> None:
    data = coco(folder, unlabeled={"images": str(folder), "boxes": str(label_file(folder)), "score": 0.5}, flip=0.0)
    records = data.unlabeled_records()
    assert [Path(file).name for file in records.files.texts()] == ["0.png", "2.png"]
    assert records.boxes.tolist() == [[8, 8, 64, 24]]
    assert [data.classes[label - 1] for label in records.labels] == ["star"]
    assert "1 boxes with scores from 0.5 in 2 images" in data.summary[-1]
    assert "1 images are not listed there and are left out; 1 boxes are of other classes" in data.summary[-1]
    unlabeled = next(iter(data.train_dataloader())).unlabeled
    assert unlabeled is not None
    assert sorted(len(target.boxes) for target in unlabeled.targets) == [0, 1]


def test_boxes_that_fit_nothing_are_refused(folder: Path) -> None:
    for entries, message in (
        ({"images": [], "annotations": []}, "none of the 3 images of data.unlabeled is listed there"),
        ({"categories": [{"id": 7, "name": "cow"}, {"id": 9, "name": "horse"}]}, "none of its classes is a class"),
        ({"annotations": [{"image_id": 1}]}, "expected COCO's format"),
    ):
        with pytest.raises(DistillError, match=message):
            coco(folder, unlabeled={"images": str(folder), "boxes": str(label_file(folder, **entries))})


def test_a_damaged_image_is_named_or_skipped(folder: Path) -> None:
    content = (folder / "more" / "0.png").read_bytes()
    (folder / "more" / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DistillError, match=r"more/0\.png: cannot be read"):
        coco(folder)
    assert len(coco(folder, on_error="skip").unlabeled_records()) == 2


@pytest.mark.parametrize(
    ("unlabeled", "message"),
    [
        ("nowhere", "this does not exist"),
        ("images/copy.png", "this is a file"),
        ("empty", "there is no image in this folder"),
        (5, "only data=shapes draws images"),
        ({"images": "images", "ratio": 0.0}, "a ratio above 0"),
        ({"images": "images", "score": 2.0}, "a score from 0 to 1"),
        ({"boxes": "teacher"}, "there are no images for these boxes"),
    ],
)
def test_bad_options_are_refused(unlabeled: Any, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    with pytest.raises(DistillError, match=message):
        coco(folder, unlabeled=unlabeled)


def test_a_checkpoint_knows_the_images() -> None:
    data, more = drawn(4), drawn(5)
    assert "unlabeled" not in shapes_data().state_dict()
    data.load_state_dict(data.state_dict())
    with pytest.raises(DistillError, match=r"data\.unlabeled: 4 images with 0 boxes there, 5 images"):
        more.load_state_dict(data.state_dict())
