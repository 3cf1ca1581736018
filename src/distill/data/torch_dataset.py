"""The source of torch data sets whose items are pairs of an image and a target, as torchvision's detectors take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data import rle
from distill.data.records import Record
from distill.imaging.conversion import as_tensor
from distill.types import DistillError


class TorchDataset:
    """The images of torch data sets.

    An item is ``(image, target)``, as in torchvision's detection references. The image is a tensor, an array or a PIL
    image (see `pixels.as_tensor`). The target is a mapping:

    * ``boxes``: (N, 4) xyxy in pixels;
    * ``labels``: (N,) from 1 to the number of classes;
    * optional: ``image_id``, ``area`` (N,), ``iscrowd`` (N,), and ``masks`` (N, H, W).

    An item must be the same whenever it is read, so its transforms may not be random: `DetectionData` augments. All
    targets are read once at the start; images are not kept.

    Args:
        classes: class names; label ``i + 1`` belongs to ``classes[i]``.
        train: the training data; a data set with a length, or a DataLoader, whose data set is used.
        val: the validation data; None splits a part off train (`DetectionData.val_fraction`).
        test: the test data; None for none.

    Raises:
        DistillError: an item has another form. The message names the item.
    """

    def __init__(self, classes: Sequence[str], train: Any, val: Any = None, test: Any = None) -> None:
        given = {"train": train, "val": val, "test": test}
        self.classes = tuple(classes)
        self.datasets: dict[str, Any] = {
            split: dataset.dataset if isinstance(dataset, DataLoader) else dataset
            for split, dataset in given.items()
            if dataset is not None
        }
        self.masks = "masks" in self._item(next(iter(self.datasets)), 0)[1]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.datasets)

    def read_split(self, split: str) -> tuple[tuple[str, ...], list[Record]]:
        """Return the class names and the records of a split.

        Raises:
            DistillError: an item has another form.
        """
        return self.classes, [self._record(split, index) for index in range(len(self.datasets[split]))]

    def load_image(self, file: str) -> Tensor:
        """Return the image (3, H, W), uint8, of a record's `file`, such as ``train/12``."""
        split, index = file.split("/")
        return as_tensor(self.datasets[split][int(index)][0], int(index))

    def _item(self, split: str, index: int) -> tuple[Any, Mapping[str, Any]]:
        item = self.datasets[split][index]
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)):
            raise DistillError(
                f"{split}, item {index}: expected (image, target) with a mapping, got {type(item).__name__}"
            )
        return item

    def _record(self, split: str, index: int) -> Record:
        image, target = self._item(split, index)
        pixels = as_tensor(image, index)
        height, width = pixels.shape[-2:]
        try:
            boxes = np.asarray(target["boxes"], dtype=np.float64).reshape(-1, 4)
            labels = np.asarray(target["labels"], dtype=np.int64).reshape(len(boxes))
            crowd = np.asarray(target.get("iscrowd", np.zeros(len(boxes))), dtype=bool).reshape(len(boxes))
            sides = boxes[:, 2:] - boxes[:, :2]
            area = np.asarray(target.get("area", sides.prod(axis=1)), dtype=np.float64).reshape(len(boxes))
            codes = None
            if self.masks:
                masks = torch.as_tensor(np.asarray(target["masks"]) > 0).reshape(len(boxes), height, width)
                codes = [rle.to_coco(code, (height, width)) for code in rle.encode_masks(masks.to(torch.uint8))]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DistillError(
                f"{split}, item {index}: expected boxes (N, 4), labels (N,) and optional entries of the same "
                f"length: {type(error).__name__} {error}"
            ) from error
        if len(labels) and not (labels.min() >= 1 and labels.max() <= len(self.classes)):
            found = np.unique(labels).tolist()
            raise DistillError(f"{split}, item {index}: expected labels from 1 to {len(self.classes)}, got {found}")
        number = target.get("image_id", index)
        return Record(
            id=int(np.asarray(number).reshape(-1)[0]),
            file=f"{split}/{index}",
            size=(height, width),
            boxes=boxes,
            labels=labels,
            crowd=crowd,
            difficult=np.zeros(len(boxes), dtype=bool),
            area=area,
            segmentation=codes,
        )
