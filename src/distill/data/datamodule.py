"""The data of a run: a source, checked once, and the loaders that feed it as Batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from distill.data.checks import SplitReport, check_overlap, check_records
from distill.data.images import ImageDataset, training_rows
from distill.data.loader import DetectionLoader
from distill.data.records import MAX_PIXELS, Record, coco_ground_truth, read_image
from distill.data.sampler import BatchSampler
from distill.data.transforms import Sample, Transform, collate, padded_size, resized_size
from distill.types import Batch, DistillError, Size

Split = str
"""``train``, ``val`` or ``test``."""


class Source(Protocol):
    """A data set in some format. One that does not keep its images in files has ``image(file) -> Tensor`` too.

    One whose records hold a segmentation for every annotation says so by ``masks = True``.
    """

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it has."""

    def read_split(self, split: str) -> tuple[Sequence[str], list[Record]]:
        """Class names, in the order of their labels from 1, and the records of a split as annotated."""


def digest_records(records: Sequence[Record], masks: bool) -> dict[str, Any]:
    """How many images and boxes there are, and a hash of all that is known of them but where their files lie."""
    seen = hashlib.sha256()
    for record in records:
        seen.update(json.dumps([record.id, record.size, record.file_size, len(record.labels)]).encode())
        for values in (record.boxes, record.labels, record.crowd, record.difficult, record.area):
            seen.update(np.ascontiguousarray(values).tobytes())
        if masks:
            seen.update(json.dumps(record.segmentation, default=str).encode())
    boxes = sum(len(record.labels) for record in records)
    return {"images": len(records), "boxes": boxes, "sha256": seen.hexdigest()}


def select_subset(records: list[Record], fraction: float, limit: int | None) -> list[Record]:
    """A part of the images for quick looks: the same for every seed, a larger part holds every smaller one."""
    order = np.random.default_rng(0).permutation(len(records))
    count = max(1, round(fraction * len(records)))
    chosen = order[: count if limit is None else min(count, limit)]
    return [records[index] for index in sorted(chosen)]


class DetectionData(L.LightningDataModule):
    """Everything between annotated files and Batches, for training and evaluation.

    Splits are read and checked on first use, or all that a stage needs in ``setup(stage)``.

    Args:
        source: where images and annotations come from.
        batch_size: training images per process and step.
        eval_batch_size: the same for evaluation; None: as in training.
        workers: loader processes per loader; 0 loads in the main process.
        min_size: shorter side after the resize in pixels, or a list of them, of which training draws one per image.
        max_size: cap of the longer side in pixels.
        eval_min_size, eval_max_size: the same for evaluation; None: the last of ``min_size``, and ``max_size``.
        antialias: whether the resize filters before it shrinks; torchvision's detectors do not.
        pad_to: batches are padded to a multiple of this many pixels.
        flip: probability of a horizontal flip in training.
        photometric: whether colours are distorted in training, as SSD does.
        aspect_groups: whether a training batch holds only upright or only broad images, which saves padding.
        drop_last: leave out a last, incomplete training batch (unless it is the only one).
        keep_empty: whether images without training targets are trained on.
        use_difficult: whether VOC's difficult objects are training targets. Off, as in VOC's own protocol and
            MMDetection (torchvision and Detectron2 train on them); evaluation ignores them in either case.
        masks: whether targets have instance masks, which a Mask R-CNN learns from, and the ground truth codes of them.
            The source's segmentations are read, checked and coded at the start.
        cache: ``none``, or ``ram``: decode and resize all images once, before the workers start.
        fraction: part of the training images that is used.
        limit: most training images.
        limit_eval: most images of val and of test.
        on_error: ``raise`` at bad data that cannot be mended safely, or ``skip`` it and count.
        on_overlap: ``warn`` or ``raise`` when an image is in more than one split.
        max_pixels: most pixels of an image file; a larger one is a fault of the data, found in its header.
        prefetch: batches that a worker prepares ahead.
        persistent_workers: whether workers stay alive between epochs.
        pin_memory: page-locked batches; None: where CUDA is available.
        seed: of shuffling and augmentation.

    Raises:
        DistillError: options that contradict each other, and all that the checks of the data find.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        workers: int = 2,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        eval_min_size: int | None = None,
        eval_max_size: int | None = None,
        antialias: bool = False,
        pad_to: int = 32,
        flip: float = 0.5,
        photometric: bool = False,
        aspect_groups: bool = True,
        drop_last: bool = True,
        keep_empty: bool = False,
        use_difficult: bool = False,
        masks: bool = False,
        cache: str = "none",
        fraction: float = 1.0,
        limit: int | None = None,
        limit_eval: int | None = None,
        on_error: str = "raise",
        on_overlap: str = "warn",
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        _validate_choice("cache", cache, ("none", "ram"))
        _validate_choice("on_error", on_error, ("raise", "skip"))
        _validate_choice("on_overlap", on_overlap, ("warn", "raise"))
        if masks and not getattr(source, "masks", False):
            raise DistillError(
                f"data.masks=true: this source ({type(source).__name__}) has boxes only, no masks. Choose data=coco with "
                "segmentations, or data=shapes; or set data.masks=false and choose a model without masks."
            )
        if cache == "ram" and len(sizes) > 1:
            raise DistillError(
                f"data.cache=ram keeps each image at one size, but data.min_size lists {len(sizes)}: {list(sizes)}. "
                "Give one size, or set data.cache=none."
            )
        if not 0 < fraction <= 1 or any(most is not None and most < 1 for most in (limit, limit_eval)):
            raise DistillError(
                f"Expected 0 < data.fraction <= 1 and limits of at least 1, got fraction={fraction}, limit={limit}, "
                f"limit_eval={limit_eval}."
            )
        self.source, self.seed = source, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.workers, self.prefetch, self.persistent_workers = workers, prefetch, persistent_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.pad_to, self.aspect_groups, self.drop_last = pad_to, aspect_groups, drop_last
        self.keep_empty, self.use_difficult, self.masks, self.cache = keep_empty, use_difficult, masks, cache
        self.fraction, self.limit, self.limit_eval = fraction, limit, limit_eval
        self.on_error, self.on_overlap, self.max_pixels = on_error, on_overlap, max_pixels
        self.train_transform = Transform(sizes, max_size, flip, photometric, antialias, seed)
        self.eval_transform = Transform((eval_min_size or sizes[-1],), eval_max_size or max_size, antialias=antialias)
        self._drawn = hasattr(source, "load_image")
        self.checked: dict[Split, SplitReport] = {}
        self.summary: list[str] = []
        self._classes: tuple[str, ...] | None = None
        self._records: dict[Split, list[Record]] = {}
        self._images: dict[tuple[Split, bool], ImageDataset] = {}
        self._truth: dict[Split, dict[str, Any]] = {}
        self._identity: dict[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check what a stage needs: fit train and val, validate val, test test, None all there is."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", self.source.splits)
        for split in wanted:
            self.records(split)

    def has_split(self, split: Split) -> bool:
        """Whether the source has this split."""
        return split in self.source.splits

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the label of ``classes[i]`` is ``i + 1``."""
        if self._classes is None:
            self.records(self.source.splits[0])
        assert self._classes is not None
        return self._classes

    @property
    def category_ids(self) -> dict[int, int]:
        """Label -> category id of the source's own files; the label itself where those have none."""
        labels = range(1, len(self.classes) + 1)  # asks for the classes first: a source knows its ids once it has read
        own: dict[int, int] | None = getattr(self.source, "category_ids", None)
        return dict(own) if own else {label: label for label in labels}

    @property
    def input_size(self) -> tuple[int, int]:
        """(min_size, max_size) of evaluation: what a deployed student is to be fed with."""
        return self.eval_transform.min_sizes[-1], self.eval_transform.max_size

    @property
    def resize(self) -> dict[str, Any]:
        """What else decides how an image is made ready for evaluation: goes with a deployed student, too."""
        return {"antialias": self.eval_transform.antialias, "pad_to": self.pad_to}

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of a split as evaluation sees it: what `digest` sees, and its images by name, classes, sizes and resize.

        A checkpoint keeps the digests alone: a run may go on where the files lie elsewhere, but what was measured there says
        nothing of other files of the same annotations.
        """
        records = self.records(split)
        files = [record.file for record in records]
        seen = [files, digest_records(records, self.masks), self.classes, self.input_size, self.resize]
        return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: its classes, and of train and val how many images and boxes, and a hash."""
        if self._identity is None:
            splits = {split: digest_records(self.records(split), self.masks) for split in ("train", "val")}
            self._identity = {"classes": list(self.classes), **splits}
        return self._identity

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume on other data.

        Raises:
            DistillError: names what differs.
        """
        found = self.differences(state_dict)
        if found:
            raise DistillError(
                f"resume: the checkpoint was made on other data: {'; '.join(found)}. Set data as it was in that run, or "
                "start a new one without ckpt_path"
            )

    def differences(self, before: dict[str, Any]) -> list[str]:
        """What of the data is not as a checkpoint's ``before`` says, in words."""
        now = self.state_dict()
        found = []
        if before["classes"] != now["classes"]:
            found.append(f"classes: {before['classes']} there, {now['classes']} here")
        for split in ("train", "val"):
            there, here = before[split], now[split]
            counts = [f"{each['images']} images with {each['boxes']} boxes" for each in (there, here)]
            if counts[0] != counts[1]:
                found.append(f"{split}: {counts[0]} there, {counts[1]} here")
            elif there != here:
                found.append(f"{split}: {counts[0]} as there, but other ids, sizes, boxes, labels or files")
        return found

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """The split in COCO's JSON form, in original pixels; ``category_id`` is our label from 1 to K."""
        if split not in self._truth:
            self._truth[split] = coco_ground_truth(self.records(split), self.classes)
        return self._truth[split]

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, augmented batches of this process's share."""
        images = self.dataset("train", training=True)
        upright: list[Hashable] = [self.aspect_groups and height > width for height, width in images.sizes.tolist()]
        sampler = BatchSampler(upright, self.batch_size, True, self.seed, *self._place(), self.drop_last)
        return self._loader(images, sampler, None if self.trainer is None else self._position)

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation split, every image once over all processes."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """The test split, every image once over all processes."""
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: Split) -> DataLoader[Sample]:
        """A split for evaluation: not shuffled, not augmented, every image once over all processes.

        A batch holds images of one padded size, so that no image's padding, which a detector can see at the border,
        depends on its neighbours.
        """
        images, groups = self.dataset(split, training=False), self.padded_sizes(split)
        rank, world = self._place()
        return self._loader(images, BatchSampler(groups, self.eval_batch_size, False, rank=rank, world=world))

    def padded_sizes(self, split: Split) -> list[Size]:
        """(height, width) of each image of a split as evaluation resizes and pads it alone."""
        images, (min_size, max_size) = self.dataset(split, training=False), self.input_size
        sizes = [resized_size(images.size(index), min_size, max_size) for index in range(len(images))]
        return [padded_size([size], self.pad_to) for size in sizes]

    def load_batch(self, split: Split, indices: Sequence[int]) -> Batch:
        """Some images of a split, by their place in ``ground_truth(split)["images"]``, as evaluation sees them."""
        images = self.dataset(split, training=False)
        return collate([images[0, index] for index in indices], self.pad_to)

    def dataset(self, split: Split, training: bool) -> ImageDataset:
        """The data set behind a loader."""
        if (split, training) not in self._images:
            records = self.records(split)
            if training and not self.keep_empty:
                records = [record for record in records if training_rows(record, self.use_difficult).any()]
                if not records:
                    raise DistillError(f"No {split} image has a box to train on. Check the annotations of {split}.")
            load = getattr(self.source, "load_image", partial(read_image, max_pixels=self.max_pixels))
            transform = self.train_transform if training else self.eval_transform
            images = ImageDataset(records, load, transform, self.use_difficult, self.masks)
            if self.cache == "ram":
                taken = images.cache_in_memory(self.workers)
                self.summary.append(
                    f"{split}: {len(images)} resized images in memory, {taken / 2**20:.0f} MiB per process"
                )
            self._images[split, training] = images
        return self._images[split, training]

    def records(self, split: Split) -> list[Record]:
        """The checked records of a split, or the part of them that the options leave."""
        if split not in self._records:
            found = self._read(split)
            if not self._drawn:
                for other, known in self._records.items():
                    check_overlap({split: found, other: known}, self.on_overlap)
            self._records[split] = found
        return self._records[split]

    def _read(self, split: Split) -> list[Record]:
        classes, annotated = self.source.read_split(split)
        if self._classes not in (None, tuple(classes)):
            raise DistillError(
                f"Expected the same classes in every split, got {list(classes)} in {split} and {list(self._classes or ())} "
                "before. Give all annotation files the same categories."
            )
        self._classes = tuple(classes)
        records, self.checked[split] = check_records(
            annotated, split, self.on_error, not self._drawn, self.masks, self.max_pixels
        )
        fraction, limit = (self.fraction, self.limit) if split == "train" else (1.0, self.limit_eval)
        part = select_subset(records, fraction, limit)
        used = "" if len(part) == len(records) else f"; {len(part)} of the images are used"
        self.summary.append(f"{self.checked[split]}{used}")
        return part

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _position(self) -> tuple[int, int]:
        """(epoch, batches of it that this process has seen): the trainer's own counts."""
        assert self.trainer is not None
        loop: Any = self.trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.completed

    def _loader(
        self, images: ImageDataset, sampler: BatchSampler, position: Callable[[], tuple[int, int]] | None = None
    ) -> DetectionLoader:
        return DetectionLoader(
            images,
            position,
            batch_sampler=sampler,
            collate_fn=partial(collate, pad_to=self.pad_to),
            num_workers=self.workers,
            persistent_workers=self.persistent_workers and self.workers > 0,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else each new iterator draws from the global stream that the models use
        )


def _validate_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise DistillError(f"data.{name}: expected one of {', '.join(known)}, got {value!r}.")
