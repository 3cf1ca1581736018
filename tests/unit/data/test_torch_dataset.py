"""torch data sets whose items are pairs of an image and a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.data.torch_dataset import TorchDataset
from distill.types import DistillError

SHAPES = Shapes(train=6, val=3, test=0, size=64)


class Pairs:
    """The drawn shapes as pairs. `change` alters a target."""

    def __init__(self, split: str, masks: bool = False, **change: Any) -> None:
        self.split, self.masks, self.change = split, masks, change
        self.records = SHAPES.read_split(split)[1]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        record = self.records[index]
        target = {"boxes": torch.tensor(record.boxes), "labels": torch.tensor(record.labels), "image_id": record.id}
        if self.masks:
            from pycocotools import mask

            target["masks"] = np.stack([mask.decode(code) for code in record.segmentation or []])
        return SHAPES.load_image(record.file).float() / 255, target | self.change


def batches(source: Any, **options: Any) -> list[Any]:
    data = DetectionData(source, batch_size=2, min_size=64, max_size=64, workers=0, **options)
    return [*data.train_dataloader(), *data.val_dataloader()]


@pytest.mark.parametrize("masks", [False, True])
def test_batches_equal_those_of_the_same_source_without_the_detour(masks: bool) -> None:
    pairs = TorchDataset(SHAPES.classes, Pairs("train", masks), DataLoader(Pairs("val", masks), batch_size=2))
    for one, other in zip(batches(SHAPES, masks=masks), batches(pairs, masks=masks), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.ids == other.ids
        for mine, its in zip(one.targets, other.targets, strict=True):
            assert torch.equal(mine.boxes, its.boxes)
            assert torch.equal(mine.labels, its.labels)
            assert (mine.masks is None) == (not masks)
            if masks:
                assert torch.equal(mine.masks, its.masks)


def test_crowds_are_no_targets() -> None:
    count = [len(record.labels) for record in SHAPES.read_split("train")[1]]
    crowd = {"iscrowd": [1] * count[0]}
    train = [Pairs("train", **crowd)[0], Pairs("train")[1]]
    data = DetectionData(TorchDataset(SHAPES.classes, train, Pairs("val")), workers=0)
    assert len(data.training_records("train")) == 1


def test_validation_images_are_split_off() -> None:
    data = DetectionData(TorchDataset(SHAPES.classes, Pairs("train")), val_fraction=0.34, workers=0)
    assert (len(data.records("train")), len(data.records("val"))) == (4, 2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TensorDataset(torch.zeros(2, 3, 8, 8)), "item 0: expected .* got tuple"),
        ([(torch.zeros(3, 8, 8), {"boxes": [[0, 0, 4, 4]]})], "item 0: expected boxes .* labels"),
        ([(torch.zeros(3, 8, 8), {"boxes": [[0, 0, 4, 4]], "labels": [1, 1]})], "item 0: expected boxes"),
        ([(torch.zeros(3, 8, 8), {"boxes": [[0, 0, 4, 4]], "labels": [0]})], "expected labels from 1 to 6, got"),
        ([(torch.zeros(5, 8, 8), {"boxes": [[0, 0, 4, 4]], "labels": [1]})], "image 0: expected a tensor"),
    ],
)
def test_another_form_is_named(train: Any, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        TorchDataset(SHAPES.classes, train).read_split("train")
