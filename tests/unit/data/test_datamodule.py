import multiprocessing
import os
import time
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from distill.data.datamodule import DetectionData, select_subset
from distill.data.records import Record
from distill.data.shapes import Shapes
from distill.data.voc import Voc
from distill.types import Batch, DistillError


def record(number: int, file: str, size: tuple[int, int], boxes, crowd=None, difficult=None) -> Record:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    return Record(
        id=number,
        file=file,
        size=size,
        boxes=boxes,
        labels=np.ones(count, np.int64),
        crowd=np.array(crowd or [False] * count, dtype=bool),
        difficult=np.array(difficult or [False] * count, dtype=bool),
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
    )


class Files:
    """A source of plain files of different sizes, with crowds, difficult objects and empty images."""

    splits = ("train", "val")

    def __init__(self, root, count: int = 12) -> None:
        self.root, self.count = root, count
        rng = np.random.default_rng(0)
        for split in self.splits:
            for number in range(count):
                height, width = self.side(number)
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"{split}{number}.png")

    @staticmethod
    def side(number: int) -> tuple[int, int]:
        return (60, 90 + 8 * (number % 5)) if number % 3 else (100, 70)

    def read_split(self, split: str):
        records = []
        for number in range(self.count):
            boxes = [[5, 6, 50, 40], [10, 10, 30, 50], [1, 1, 60, 60]]
            marks = ([False, True, False], [False, False, True])
            if number == 4:
                boxes, marks = [], ([], [])
            if number == 5:
                boxes, marks = [[1, 1, 60, 60]], ([True], [False])
            file = str(self.root / f"{split}{number}.png")
            records.append(record(1000 + number, file, self.side(number), boxes, *marks))
        return ("thing",), records


def shapes(**options) -> DetectionData:
    options = {"batch_size": 4, "workers": 0, "min_size": 64, "max_size": 96} | options
    return DetectionData(Shapes(train=20, val=9, test=5, size=64), **options)


def files(tmp_path, **options) -> DetectionData:
    options = {"batch_size": 4, "workers": 0, "min_size": 48, "max_size": 96, "flip": 0.0} | options
    return DetectionData(Files(tmp_path), **options)


def same(a: Batch, b: Batch) -> bool:
    targets = zip(a.targets, b.targets, strict=True)
    return (
        torch.equal(a.images, b.images)
        and (a.sizes, a.original_sizes, a.ids) == (b.sizes, b.original_sizes, b.ids)
        and all(
            torch.equal(x.boxes, y.boxes)
            and torch.equal(x.labels, y.labels)
            and (x.masks is None if y.masks is None else torch.equal(x.masks, y.masks))
            for x, y in targets
        )
    )


AUGMENT = {"mosaic": 0.4, "zoom_out": 0.4, "iou_crop": 0.4, "scale_jitter": [0.5, 1.5]}
OWN = [v2.RandomGrayscale(0.5), v2.RandomInvert(0.5)]


def test_a_sample_of_a_mosaic_does_not_depend_on_the_samples_before_or_on_the_cache():
    plain, cached = (shapes(augment=AUGMENT, cache=cache).dataset("train", training=True) for cache in ("none", "ram"))
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    first = {key: plain[key] for key in keys}
    for key in reversed(keys):
        for again in (plain[key], cached[key]):
            assert torch.equal(again.image, first[key].image)
            assert torch.equal(again.target.boxes, first[key].target.boxes)
            assert again.id == first[key].id == int(plain.ids[key[1]])


def test_augmentation_is_for_training_alone_and_a_mistyped_option_is_named():
    data = shapes(augment=AUGMENT | {"mosaic": 1.0}, transforms=[v2.RandomInvert(1.0)])
    assert all(same(a, b) for a, b in zip(data.val_dataloader(), shapes().val_dataloader(), strict=True))
    with pytest.raises(DistillError, match=r"data\.augment: unknown option 'mosiac'.*data\.augment\.mosaic"):
        shapes(augment={"mosiac": 1.0})
    with pytest.raises(DistillError, match=r"data\.augment\.fill: expected Sequence\[int\], got"):
        shapes(augment={"fill": "gray"})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_reports_a_failed_transform_in_one_sentence(workers):
    loader = shapes(workers=workers, transforms=[v2.Grayscale()]).train_dataloader()
    with pytest.raises(DistillError, match=r"^data\.transforms\[0\] \(Grayscale\): expected an image[^\n]*$"):
        next(iter(loader))


def ids(loader) -> list[int]:
    return [number for batch in loader for number in batch.ids]


def test_a_batch_is_as_promised():
    data = shapes()
    data.setup("fit")
    for batch in data.train_dataloader():
        assert isinstance(batch, Batch)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 3, 64, 64)
        assert all(type(size) is tuple for size in (*batch.sizes, *batch.original_sizes))
        for target in batch.targets:
            assert target.boxes.dtype == torch.float32
            assert target.labels.dtype == torch.int64
            assert (target.boxes >= 0).all()
            assert (target.boxes <= 64).all()


def test_epochs_and_workers_and_start_method_change_no_pixel():
    def epochs(**options):
        data = shapes(min_size=[48, 56, 64], photometric=True, augment=AUGMENT, transforms=OWN, masks=True, **options)
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            found.append(list(loader))
        return found

    alone, helped = epochs(), epochs(workers=2)
    for a, b in zip(alone, helped, strict=True):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert not any(same(x, y) for x, y in zip(*alone, strict=True))


def test_loaders_leave_the_global_random_stream_alone():
    data = shapes()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_share_the_images(monkeypatch):
    data = shapes(batch_size=2)
    wholes = sorted(ids(shapes().train_dataloader())), sorted(ids(shapes().val_dataloader()))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(data, "_place", lambda rank=rank: (rank, 2))
        parts.append((ids(data.train_dataloader()), ids(data.val_dataloader())))
    for number, whole in enumerate(wholes):
        assert sorted(parts[0][number] + parts[1][number]) == whole


def test_training_targets_leave_out_crowds_and_difficult_objects_but_the_truth_keeps_them(tmp_path):
    data = files(tmp_path)
    targets = [target for batch in data.train_dataloader() for target in batch.targets]
    assert targets
    assert all(len(target.labels) == 1 for target in targets)
    truth = data.ground_truth("train")
    of_first = [entry for entry in truth["annotations"] if entry["image_id"] == 1000]
    assert [entry["iscrowd"] for entry in of_first] == [0, 1, 0]
    assert [entry["difficult"] for entry in of_first] == [0, 0, 1]
    with_difficult = files(tmp_path, use_difficult=True).train_dataloader()
    assert {len(target.labels) for batch in with_difficult for target in batch.targets} == {2}


def test_images_without_targets_train_only_on_request_but_are_always_evaluated(tmp_path):
    assert not {1004, 1005} & set(ids(files(tmp_path, drop_last=False).train_dataloader()))
    assert {1004, 1005} <= set(ids(files(tmp_path, drop_last=False, keep_empty=True).train_dataloader()))
    data = files(tmp_path)
    assert sorted(ids(data.val_dataloader())) == [1000 + number for number in range(12)]
    assert [image["id"] for image in data.ground_truth("val")["images"]] == [1000 + number for number in range(12)]


def test_boxes_follow_the_resize(tmp_path):
    for batch in files(tmp_path).val_dataloader():
        for target, size, original in zip(batch.targets, batch.sizes, batch.original_sizes, strict=True):
            if len(target.boxes):
                scale_x, scale_y = size[1] / original[1], size[0] / original[0]
                wanted = torch.tensor([5 * scale_x, 6 * scale_y, 50 * scale_x, 40 * scale_y])
                assert torch.allclose(target.boxes[0], wanted, atol=1e-4)


def test_an_evaluated_images_padding_does_not_depend_on_its_neighbours(tmp_path):
    def padded(**options) -> dict[int, tuple[int, ...]]:
        loader = files(tmp_path, **options).val_dataloader()
        return {number: tuple(batch.images.shape[-2:]) for batch in loader for number in batch.ids}

    assert padded(eval_batch_size=1) == padded(eval_batch_size=5)


def test_training_batches_are_upright_or_broad(tmp_path):
    loader = files(tmp_path, batch_size=2).train_dataloader()
    kinds = [{height > width for height, width in batch.sizes} for batch in loader]
    assert sum(len(kind) > 1 for kind in kinds) <= 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_cache_changes_speed_and_nothing_else(tmp_path, workers):
    plain, cached = (files(tmp_path, cache=cache, flip=0.5, workers=workers) for cache in ("none", "ram"))
    for _ in range(2):
        for make in ("train_dataloader", "val_dataloader"):
            for a, b in zip(getattr(plain, make)(), getattr(cached, make)(), strict=True):
                assert same(a, b)
    assert any("MiB" in line for line in cached.summary)


def test_the_cache_reads_each_file_once(tmp_path, monkeypatch):
    data = files(tmp_path, cache="ram")
    list(data.val_dataloader())
    for file in tmp_path.glob("val*.png"):
        file.unlink()
    assert len(ids(data.val_dataloader())) == 12


def test_quick_looks_are_nested_and_the_same_for_every_seed():
    def chosen(fraction, limit):
        return np.flatnonzero(select_subset(100, fraction, limit)).tolist()

    small, large = chosen(0.1, None), chosen(0.3, None)
    assert len(small) == 10
    assert set(small) < set(large)
    assert chosen(0.3, 10) == small
    assert chosen(1.0, None) == list(range(100))
    a, b = (shapes(limit=6, limit_eval=3, seed=seed, drop_last=False) for seed in (0, 1))
    assert sorted(ids(a.train_dataloader())) == sorted(ids(b.train_dataloader()))
    assert len(ids(a.train_dataloader())) == 6
    assert len(ids(a.val_dataloader())) == len(a.ground_truth("val")["images"]) == 3


def test_pictures_get_the_images_they_ask_for(tmp_path):
    data = files(tmp_path, flip=1.0)
    batch = data.load_batch("val", [7, 2])
    truth = data.ground_truth("val")["images"]
    assert batch.ids == (truth[7]["id"], truth[2]["id"])


def test_facts_are_known():
    data = shapes(min_size=[48, 64], eval_max_size=80)
    assert data.input_size == (64, 80)
    assert len(data.classes) == 6
    assert data.category_ids == {label: label for label in range(1, 7)}
    assert data.has_split("test")
    assert not data.has_split("other")
    data.setup("fit")
    assert data.summary


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "ram", "min_size": [48, 64]}, r"cache=ram.*\[48, 64\].*cache=none"),
        ({"cache": "disk"}, r"data\.cache.*none, ram.*disk"),
        ({"on_error": "ignore"}, r"data\.on_error"),
        ({"on_overlap": "ignore"}, r"data\.on_overlap"),
        ({"fraction": 0.0}, r"fraction"),
        ({"limit": 0}, r"limit"),
        ({"min_size": 800, "max_size": 600}, r"min_size"),
        ({"flip": 1.5}, r"flip"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(DistillError, match=words):
        shapes(**options)


class Recorder(L.LightningModule):
    """Keeps the ids of all training images, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[tuple[int, ...]]] = {}

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch.ids)
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch: Batch, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, epochs: int, workers: int, ckpt=None) -> Recorder:
    module = Recorder()
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver],
    )
    trainer.fit(module, shapes(workers=workers), ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return module


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *[("epoch=1.ckpt", 1), ("end.ckpt", 0)],
        *[pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("epoch=1.ckpt", 0), ("end.ckpt", 1))],
    ],
)
def test_a_resumed_run_sees_the_images_of_an_unbroken_one(tmp_path, workers, name):
    whole = fit(tmp_path / "whole", 3, 0)
    fit(tmp_path, 2, workers)
    rest = fit(tmp_path, 3, workers, str(tmp_path / name))
    assert list(rest.seen) == [2]
    assert rest.seen[2] == whole.seen[2]
    assert whole.seen[1] != whole.seen[2]


def test_real_blood_cells_arrive_whole():
    root = os.environ.get("DISTILL_TEST_DATA")
    if not root:
        pytest.skip("set DISTILL_TEST_DATA to the folder that holds bccd/BCCD")
    data = DetectionData(Voc(f"{root}/bccd/BCCD"), 16, workers=0, min_size=120, max_size=160, eval_batch_size=16)
    images = boxes = 0
    for split in ("train", "val", "test"):
        for batch in data.eval_dataloader(split):
            assert batch.images.shape[1:] == (3, 128, 160)
            assert set(batch.sizes) == {(120, 160)}
            images += len(batch)
            boxes += sum(len(target.labels) for target in batch.targets)
            for target in batch.targets:
                assert (target.boxes >= 0).all()
                assert (target.boxes[:, 2] <= 160).all()
                assert (target.boxes[:, 3] <= 120).all()
    assert (images, boxes) == (205 + 87 + 72, 4886)
    assert data.classes == ("Platelets", "RBC", "WBC")


def test_spawned_workers_get_the_same_images():
    data = shapes(cache="ram")
    images = data.dataset("val", training=False)
    there = ForkingPickler.loads(ForkingPickler.dumps(images))
    assert torch.equal(there[0, 3].image, images[0, 3].image)
    drawn = shapes().dataset("val", training=False)
    assert torch.equal(ForkingPickler.loads(ForkingPickler.dumps(drawn))[0, 3].image, images[0, 3].image)


class Overlapping(Files):
    """Trains on what it validates on."""

    def read_split(self, split: str):
        return super().read_split("train")


def test_overlap_is_said_once_or_raised(tmp_path):
    options = {"batch_size": 4, "workers": 0, "min_size": 48, "max_size": 96}
    data = DetectionData(Overlapping(tmp_path), **options)
    with pytest.warns(UserWarning, match="12 images of val are in train"):
        data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
        data.setup("validate")
    with pytest.raises(DistillError, match="12 images of val are in train"):
        DetectionData(Overlapping(tmp_path), on_overlap="raise", **options).setup("fit")


def test_bad_data_is_named_before_the_first_step_or_skipped(tmp_path):
    source = Files(tmp_path)
    (tmp_path / "train3.png").unlink()
    options = {"batch_size": 4, "workers": 0, "min_size": 48, "max_size": 96, "drop_last": False}
    with pytest.raises(DistillError, match=r"train3\.png"):
        DetectionData(source, **options).setup("fit")
    data = DetectionData(source, on_error="skip", **options)
    data.setup("fit")
    assert 1003 not in ids(data.train_dataloader())
    assert 1003 not in [image["id"] for image in data.ground_truth("train")["images"]]


def test_splits_with_different_classes_are_refused(tmp_path):
    class Changing(Files):
        def read_split(self, split: str):
            return (split,), super().read_split(split)[1]

    with pytest.raises(DistillError, match=r"same classes.*\['val'\] in val and \['train'\]"):
        DetectionData(Changing(tmp_path), workers=0).setup("fit")


def test_more_processes_than_images_is_an_error_and_not_a_hang(monkeypatch):
    data = shapes(limit_eval=1)
    monkeypatch.setattr(data, "_place", lambda: (0, 2))
    with pytest.raises(DistillError, match="1 images for 2 processes"):
        data.val_dataloader()


def test_a_checkpoint_knows_its_data_wherever_the_files_lie(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    held = files(tmp_path / "here").state_dict()
    moved = files(tmp_path / "there", workers=2, min_size=40)
    assert moved.differences(held) == []
    moved.load_state_dict(held)
    assert held["train"]["images"] == 12
    assert held["train"]["boxes"] == 10 * 3 + 0 + 1  # crowds, difficult objects and empty images are data, too


class Changed(Files):
    """One thing is other than in `Files`."""

    def __init__(self, root, change) -> None:
        super().__init__(root)
        self.change = change

    def read_split(self, split: str):
        classes, records = super().read_split(split)
        return self.change(split, classes, records)


def moved_box(split, classes, records):
    records[3].boxes[0, 0] += 0.25 * (split == "val")
    return classes, records


def marked(split, classes, records):
    records[3].crowd[0] |= split == "train"
    return classes, records


def rewritten(split, classes, records):
    """An image of other pixels under the same name."""
    if split == "train":
        with Path(records[3].file).open("ab") as file:
            file.write(b"\0")
    return classes, records


def renumbered(split, classes, records):
    records[3].id += 100 * (split == "train")
    return classes, records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda split, classes, records: (("item",), records), r"classes: \['thing'\] there, \['item'\] here"),
        (
            lambda split, classes, records: (classes, records[:-1]),
            r"train: \d+ images with \d+ boxes there, \d+ images",
        ),
        (moved_box, r"val: \d+ images with \d+ boxes as there, but other ids, sizes, boxes, labels or files"),
        (rewritten, r"train: \d+ images with \d+ boxes as there, but other"),
        (marked, "train: .* as there, but other"),
        (renumbered, "train: .* as there, but other"),
    ],
)
def test_a_resume_on_other_data_is_refused_by_name(tmp_path, change, words):
    held = files(tmp_path).state_dict()
    other = DetectionData(Changed(tmp_path, change), batch_size=4, workers=0, min_size=48, max_size=96)
    assert len(other.differences(held)) == (2 if "images" in words and "as there" not in words else 1)
    with pytest.raises(DistillError, match=words):
        other.load_state_dict(held)


@pytest.mark.parametrize("alive", [False, True])
def test_a_loader_that_cannot_be_talked_to_is_named_where_it_died(monkeypatch, alive):
    """Torch says so itself only while none of its batches is on the way."""
    children = []

    def broken(self):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        children.append(child)

        def batches():
            yield 1
            if not alive:
                child.kill()
                child.join()
            raise ConnectionResetError(104, "Connection reset by peer")

        return batches()

    monkeypatch.setattr(DataLoader, "__iter__", broken)
    batches = iter(shapes().eval_dataloader("val"))
    next(batches)
    with pytest.raises(
        ConnectionResetError if alive else RuntimeError, match="" if alive else "a DataLoader worker died"
    ):
        next(batches)
    children[0].kill()
