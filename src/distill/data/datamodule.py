"""The data of a run: a source, whose records are checked once, and loaders that yield instances of `Batch`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data.augment import NO_AUGMENTATION, Augmentation
from distill.data.checks import SplitReport, check_overlap, check_records
from distill.data.class_names import describe_similar_names
from distill.data.hold_out import HeldOut, hold_out_images, select_with_faults
from distill.data.identity import describe_differences, digest_records
from distill.data.images import ImageDataset, training_rows
from distill.data.loader import BatchDataset, DetectionLoader
from distill.data.own_transforms import OwnTransform
from distill.data.records import Record, Records, coco_ground_truth, pack_records
from distill.data.sampler import BatchSampler, JointBatchSampler
from distill.data.transforms import Sample, Transform, collate
from distill.data.unlabeled import (
    NO_UNLABELED,
    TEACHER,
    FindBoxes,
    FoundBoxes,
    JointImages,
    Unlabeled,
    add_boxes,
    leave_out_labeled,
    read_boxes,
    read_unlabeled,
)
from distill.imaging.decoding import MAX_PIXELS, read_image
from distill.imaging.resizing import padded_size
from distill.type_checks import parse_options
from distill.types import Batch, DistillError, Size

Split = str
"""`train`, `val` or `test`."""


class Source(Protocol):
    """A data set in some format.

    A source without image files also has a method `load_image(file) -> Tensor`. A source whose records have a
    segmentation for every annotation has the attribute `masks = True`. A source that can draw images without labels has
    a method `draw_unlabeled(count) -> list[Record]`. A source that reads image files itself has the
    attribute `max_pixels`, which is set to `data.max_pixels`. A source with category ids of its own has the
    attribute `category_ids`, a mapping of label to id.
    """

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that the source has."""

    def read_split(self, split: str) -> tuple[Sequence[str], Sequence[Record]]:
        """Return the class names, in the order of their labels from 1, and the records of a split as annotated."""


def select_subset(count: int, fraction: float, limit: int | None) -> NDArray[np.bool_]:
    """Choose a part of the images for quick runs. Return it as a mask (N,).

    The choice is the same for every seed. A larger part contains every smaller one. At least one image is kept.

    Args:
        count: number of images of a split.
        fraction: part to keep, in (0, 1].
        limit: largest number of images to keep; None for no limit.
    """
    order = np.random.default_rng(0).permutation(count)
    chosen = max(1, round(fraction * count))
    is_chosen = np.zeros(count, dtype=np.bool_)
    is_chosen[order[: chosen if limit is None else min(chosen, limit)]] = True
    return is_chosen


class DetectionData(L.LightningDataModule):
    """The data pipeline from annotated files to instances of `Batch`, for training and evaluation.

    `setup(stage)` reads and checks the splits of a stage. Any other split is read and checked on first use.

    Args:
        source: source of the images and annotations.
        batch_size: training images per process and step.
        eval_batch_size: evaluation images per process and step; None: `batch_size`.
        workers: loader processes per loader; 0 loads in the main process.
        min_size: shorter side after the resize in pixels, or a list of sizes; training draws one size per image.
        max_size: upper limit of the longer side after the resize in pixels.
        eval_min_size, eval_max_size: the same for evaluation; None: the last of `min_size`, and `max_size`.
        resize: `ratio` keeps the ratio of an image's sides. `square` gives both sides the length `min_size`, for
            detectors that see padding as image (RT-DETR, D-FINE).
        antialias: whether the resize filters images before it shrinks them; torchvision's detectors do not.
        pad_to: batches are padded to a multiple of this number of pixels.
        flip: probability of a horizontal flip in training.
        photometric: whether training distorts the colors as SSD does.
        augment: mosaic, zoom-out, IoU crop and scale jitter in training: an `Augmentation`, or its options.
        transforms: transforms of the user for training, after all others; see `own_transforms.OwnTransform`.
        aspect_groups: whether a training batch contains only upright or only broad images, which saves padding.
        drop_last: whether the last training batch is left out if it is incomplete and not the only one.
        keep_empty: whether training uses images without training targets.
        use_difficult: whether VOC's difficult objects are training targets. Off, as in VOC's own protocol and
            MMDetection; torchvision and Detectron2 train on them. Evaluation ignores them in either case.
        masks: whether targets have instance masks, which a Mask R-CNN needs, and the ground truth has their codes. The
            source's segmentations are read, checked and encoded at the start.
        cache: `none`, or `ram`: all images are decoded and resized once, before the workers start.
        fraction: part of the training images to use, in (0, 1].
        limit: largest number of training images; None for no limit.
        limit_eval: largest number of images of val and of test; None for no limit.
        val_fraction: part of the training images that become val if the source has no val split; see
            `hold_out.hold_out_images`. With 0, a run needs a val split. The configuration has 0.2.
        val_seed: seed of this choice. The seed of the run does not change it, so runs of several seeds are comparable.
        val_group_similar: whether images that look alike, such as frames of one video, stay on one side of this choice.
        on_error: `raise` for invalid data that cannot be repaired safely, or `skip` to leave it out and count it.
        on_overlap: `warn` or `raise` if an image is in more than one split.
        unlabeled: images without labels, on which only the distillation losses train: an `unlabeled.Unlabeled`, its
            options, or its `images`.
        max_pixels: largest number of pixels of an image file. The header of a larger file is enough to report a fault.
        prefetch: number of batches that a worker prepares ahead.
        persistent_workers: whether workers stay alive between epochs.
        pin_memory: whether batches are in page-locked memory; None: if CUDA is available.
        seed: seed of shuffling and augmentation.

    Raises:
        DistillError: an option is out of range, options contradict each other, or a check of the data fails.
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
        resize: str = "ratio",
        antialias: bool = False,
        pad_to: int = 32,
        flip: float = 0.5,
        photometric: bool = False,
        augment: Augmentation | Mapping[str, Any] = NO_AUGMENTATION,
        transforms: Sequence[OwnTransform] = (),
        aspect_groups: bool = True,
        drop_last: bool = True,
        keep_empty: bool = False,
        use_difficult: bool = False,
        masks: bool = False,
        cache: str = "none",
        fraction: float = 1.0,
        limit: int | None = None,
        limit_eval: int | None = None,
        val_fraction: float = 0.0,
        val_seed: int = 0,
        val_group_similar: bool = True,
        on_error: str = "raise",
        on_overlap: str = "warn",
        unlabeled: Unlabeled | Mapping[str, Any] | str | int = NO_UNLABELED,
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
                f"data.masks=true: this source ({type(source).__name__}) has boxes only, no masks. Choose data=coco "
                "with segmentations, or data=shapes; or set data.masks=false and choose a model without masks."
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
        if not 0 <= val_fraction < 1:
            raise DistillError(f"data.val_fraction: expected a number from 0 to below 1, got {val_fraction}")
        self.source, self.seed, self.val_fraction = source, seed, val_fraction
        self.val_seed, self.val_group_similar = val_seed, val_group_similar
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.workers, self.prefetch, self.persistent_workers = workers, prefetch, persistent_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.pad_to, self.aspect_groups, self.drop_last = pad_to, aspect_groups, drop_last
        self.keep_empty, self.use_difficult, self.masks, self.cache = keep_empty, use_difficult, masks, cache
        self.fraction, self.limit, self.limit_eval = fraction, limit, limit_eval
        self.on_error, self.on_overlap, self.max_pixels = on_error, on_overlap, max_pixels
        named = {"images": unlabeled} if isinstance(unlabeled, str | int) else unlabeled
        self.unlabeled = parse_options("data.unlabeled", named, NO_UNLABELED)
        augmentation = parse_options("data.augment", augment, NO_AUGMENTATION)
        self.train_transform = Transform(
            sizes, max_size, flip, photometric, antialias, seed, augmentation, transforms, resize
        )
        self.eval_transform = Transform(
            (eval_min_size or sizes[-1],), eval_max_size or max_size, antialias=antialias, shape=resize
        )
        self._drawn = hasattr(source, "load_image")
        if hasattr(source, "max_pixels"):
            source.max_pixels = max_pixels
        self.checked: dict[Split, SplitReport] = {}
        self.summary: list[str] = []
        self._classes: tuple[str, ...] | None = None
        self._records: dict[Split, Records] = {}
        self._images: dict[tuple[Split, bool], ImageDataset] = {}
        self._truth: dict[Split, dict[str, Any]] = {}
        self._identity: dict[str, Any] | None = None
        self._held_out: HeldOut | None = None
        self._unlabeled_records: Records | None = None
        self._has_teacher_boxes = False
        self._evaluated: dict[Split, Records] = {}
        """All images of val and test, also those beyond `limit_eval`, if there are images without labels."""

    def setup(self, stage: str | None = None) -> None:
        """Read and check the splits of a stage.

        Args:
            stage: `fit` for train and val, `validate` for val, `test` for test, None for all splits.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", self.splits)
        for split in wanted:
            self.records(split)
        if "train" in wanted and self.has_unlabeled:
            self.unlabeled_records()

    def has_split(self, split: Split) -> bool:
        """Whether there is this split, in the source or split off train."""
        return split in self.splits

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        own = self.source.splits
        return ("train", "val", *own[1:]) if self._is_val_held_out else own

    @property
    def _is_val_held_out(self) -> bool:
        return self.val_fraction > 0 and self.source.splits[:1] == ("train",) and "val" not in self.source.splits

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the label of `classes[i]` is `i + 1`."""
        if self._classes is None:
            self.records(self.source.splits[0])
        assert self._classes is not None
        return self._classes

    @property
    def category_ids(self) -> dict[int, int]:
        """Label to category id of the source's files, or to the label itself if the source has no category ids."""
        labels = range(1, len(self.classes) + 1)  # read the classes first: a source knows its ids only then
        own: dict[int, int] | None = getattr(self.source, "category_ids", None)
        return dict(own) if own else {label: label for label in labels}

    @property
    def input_size(self) -> tuple[int, int]:
        """(min_size, max_size) of evaluation, in pixels. A deployed student needs inputs of this size."""
        return self.eval_transform.min_sizes[-1], self.eval_transform.max_size

    @property
    def resize_options(self) -> dict[str, Any]:
        """The other settings of the resize for evaluation, which a deployed student needs too."""
        transform = self.eval_transform
        return {"antialias": transform.antialias, "pad_to": self.pad_to, "shape": transform.shape}

    def fingerprint(self, split: Split) -> str:
        """Return the SHA-256 hash of a split as evaluation sees it.

        The hash covers the digest of the records, the paths of the image files, the classes, the input size and the
        resize. A checkpoint stores only the digests: a run may continue after the files were moved. A measured AP, in
        contrast, is not valid for other image files with the same annotations.
        """
        records = self.records(split)
        # An older version knew only the ratio. The fingerprints of its runs stay valid.
        resize = {name: value for name, value in self.resize_options.items() if (name, value) != ("shape", "ratio")}
        seen = self.classes, self.input_size, resize
        facts = [records.files.texts(), digest_records(records, self.masks), *seen]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the classes and, of train and val, the numbers of images and boxes and a hash, for a checkpoint."""
        if self._identity is None:
            splits = {split: digest_records(self.records(split), self.masks) for split in ("train", "val")}
            self._identity = {"classes": list(self.classes), **splits}
            if self.has_unlabeled:
                self._identity["unlabeled"] = digest_records(self.unlabeled_records(), masks=False)
        return self._identity

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the data with the state in a checkpoint.

        Raises:
            DistillError: the data differs. The message lists the differences.
        """
        differences = self.differences(state_dict)
        if differences:
            raise DistillError(
                f"resume: the checkpoint was made on other data: {'; '.join(differences)}. Set data as it was in that "
                "run, or start a new one without ckpt_path"
            )

    def differences(self, before: dict[str, Any]) -> list[str]:
        """Describe the differences between a checkpoint's state `before` and this data, one text each."""
        return describe_differences(before, self.state_dict())

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """Return a split in COCO's JSON form, in original pixels. Its `category_id` is the label, from 1 to K."""
        if split not in self._truth:
            self._truth[split] = coco_ground_truth(self.records(split), self.classes)
        return self._truth[split]

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of this process's share of the training images, shuffled and augmented."""
        images, sampler = self.labeled_batches()
        position = None if self.trainer is None else self._position
        if not self.has_unlabeled:
            return self._loader(images, sampler, position)
        others = self._unlabeled_images()
        joint = JointBatchSampler(sampler, self._shapes(others), self.unlabeled.per_batch(self.batch_size))
        has_boxes = self.unlabeled.boxes is not None and not self.needs_boxes
        return self._loader(JointImages(images, others, has_boxes), joint, position)

    def labeled_batches(self) -> tuple[ImageDataset, BatchSampler]:
        """Return the labeled training images, and the sampler of this process's batches of them."""
        images = self.dataset("train", training=True)
        return images, BatchSampler(
            self._shapes(images), self.batch_size, True, self.seed, *self._place(), self.drop_last
        )

    def _shapes(self, images: ImageDataset) -> list[Hashable]:
        """For each image, whether it is upright; without `aspect_groups`, the same value for all."""
        return [self.aspect_groups and height > width for height, width in images.sizes.tolist()]

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the validation split. Every image occurs once over all processes."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the test split. Every image occurs once over all processes."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the test split for `Trainer.predict`, or of val if there is no test split."""
        loader: Any = self.eval_dataloader("test" if self.has_split("test") else "val")
        batches = BatchDataset(loader.dataset, list(loader.batch_sampler), loader.collate_fn)
        return DataLoader(batches, batch_size=None, num_workers=self.workers)

    def eval_dataloader(self, split: Split) -> DataLoader[Sample]:
        """Return a loader of a split for evaluation, without shuffling or augmentation.

        Every image occurs once over all processes. All images of a batch have the same padded size. So the padding of
        an image, which affects detections at the border, does not depend on the other images of the batch.
        """
        images, groups = self.dataset(split, training=False), self.padded_sizes(split)
        rank, world = self._place()
        return self._loader(images, BatchSampler(groups, self.eval_batch_size, False, rank=rank, world=world))

    def padded_sizes(self, split: Split) -> list[Size]:
        """Return the (height, width) of each image of a split after evaluation's resize and padding."""
        images = self.dataset(split, training=False)
        sizes = [self.eval_transform.fit(images.size(index)) for index in range(len(images))]
        return [padded_size([size], self.pad_to) for size in sizes]

    def load_batch(self, split: Split, indices: Sequence[int]) -> Batch:
        """Load images of a split as evaluation sees them, by their indices in `ground_truth(split)["images"]`."""
        images = self.dataset(split, training=False)
        return collate([images[0, index] for index in indices], self.pad_to)

    def dataset(self, split: Split, training: bool) -> ImageDataset:
        """Return the data set of a loader.

        Raises:
            DistillError: no image has a training target, in training without `keep_empty`.
        """
        if (split, training) not in self._images:
            records = self.training_records(split) if training else self.records(split)
            load = self._load_image
            transform = self.train_transform if training else self.eval_transform
            self._images[split, training] = self._cached(
                split, ImageDataset(records, load, transform, self.use_difficult, self.masks)
            )
        return self._images[split, training]

    def _cached(self, name: str, images: ImageDataset) -> ImageDataset:
        if self.cache == "ram":
            taken = images.cache_in_memory(self.workers)
            self.summary.append(f"{name}: {len(images)} resized images in memory, {taken / 2**20:.0f} MiB per process")
        return images

    def training_records(self, split: Split) -> Records:
        """Return the records of a split that a training uses: those with training targets, all with `keep_empty`.

        Raises:
            DistillError: no image has a training target, without `keep_empty`.
        """
        records = self.records(split)
        if self.keep_empty:
            return records
        targets = records.row_images()[training_rows(records, self.use_difficult)]
        used = records.select(np.bincount(targets, minlength=len(records)) > 0)
        if not len(used):
            raise DistillError(
                f"No {split} image has a box to train on: of {len(records.labels)} boxes, "
                f"{int(records.crowd.sum())} are crowds (iscrowd=1), which are no training targets, and "
                f"{int(records.difficult.sum())} are difficult. Check the annotations of {split}, or set "
                "data.use_difficult=true for difficult objects."
            )
        return used

    @property
    def _read_file(self) -> Callable[[str], Tensor]:
        return partial(read_image, max_pixels=self.max_pixels)

    @property
    def _load_image(self) -> Callable[[str], Tensor]:
        load: Callable[[str], Tensor] = getattr(self.source, "load_image", self._read_file)
        return load

    # -- images without labels

    @property
    def has_unlabeled(self) -> bool:
        """Whether training batches have images without labels."""
        return self.unlabeled.images is not None

    @property
    def needs_boxes(self) -> bool:
        """Whether the images without labels still have to get the boxes of the teacher."""
        return self.unlabeled.boxes == TEACHER and not self._has_teacher_boxes

    @property
    def _draws_unlabeled(self) -> bool:
        return isinstance(self.unlabeled.images, int)

    @property
    def load_unlabeled(self) -> Callable[[str], Tensor]:
        """Loads an image without labels (3, H, W), uint8, by the `file` of its record."""
        return self._load_image if self._draws_unlabeled else self._read_file

    def leave_out_unlabeled(self) -> None:
        """Train on labeled images alone, in a run without distillation losses."""
        self.unlabeled = NO_UNLABELED
        self.summary.append("unlabeled: left out; without distillation losses, nothing is learned from these images")

    def unlabeled_records(self) -> Records:
        """Return the checked images without labels. Images that train, val or test have are left out.

        Raises:
            DistillError: there are no such images, or an image is invalid.
        """
        if self._unlabeled_records is None:
            self._unlabeled_records = self._read_unlabeled()
        return self._unlabeled_records

    def _read_unlabeled(self) -> Records:
        name = self.unlabeled.images
        assert name is not None
        drawn = self._draws_unlabeled
        records = read_unlabeled(name, self.source)
        left_out: dict[str, int] = {}
        if not drawn and not self._drawn:
            records, left_out = leave_out_labeled(records, self._labeled_splits())
            if not len(records):
                raise DistillError(
                    f"data.unlabeled={name}: all its images are labeled images of {', '.join(left_out)}. Name a folder "
                    "with other images; data.limit=N takes labels from all training images but N"
                )
        records, report = check_records(
            records, "unlabeled", self.on_error, not drawn, max_pixels=self.max_pixels, need_boxes=False
        )
        shared = "".join(f"; {count} images of {split} are left out" for split, count in left_out.items())
        turned = f", {report.turned} turned by EXIF" if report.turned else ""
        skipped = "".join(f", {count} {what}" for what, count in report.skipped.items())
        self.summary.append(f"unlabeled: {len(records)} images{turned}{skipped}{shared}")
        if self.unlabeled.boxes not in (None, TEACHER):
            records = self._with_boxes(records, read_boxes(Path(str(self.unlabeled.boxes)).expanduser()))
        return records

    def _labeled_splits(self) -> dict[Split, Records]:
        """The images that are labeled training images, and all images on which a detector is evaluated."""
        splits = {"train": self.records("train")}
        for split in self.splits[1:]:
            with suppress(DistillError):  # a run goes on without a test split that cannot be read
                self.records(split)
                splits[split] = self._evaluated[split]
        return splits

    def label_unlabeled(self, find_boxes: FindBoxes, bridge: Mapping[str, str] | None = None) -> str:
        """Give the images without labels the boxes of a teacher, and return a line about them.

        Args:
            find_boxes: finds the boxes.
            bridge: class name of the boxes -> class name of the data; None: by exact name.

        Raises:
            DistillError: the teacher knows no class of the data.
        """
        records = self.unlabeled_records()
        _ = self.state_dict()  # the identity of the images without boxes, which depend on the teacher
        self._unlabeled_records = self._with_boxes(records, find_boxes(records), bridge)
        self._has_teacher_boxes = True
        return self.summary[-1].removeprefix("unlabeled: ")

    def _with_boxes(self, records: Records, found: FoundBoxes, bridge: Mapping[str, str] | None = None) -> Records:
        labeled, line = add_boxes(records, found, self.unlabeled.score, self.classes, bridge)
        self.summary.append(f"unlabeled: {line}")
        return labeled

    def _unlabeled_images(self) -> ImageDataset:
        key = ("unlabeled", True)
        if key not in self._images:
            images = ImageDataset(self.unlabeled_records(), self.load_unlabeled, self.train_transform)
            self._images[key] = self._cached("unlabeled", images)
        return self._images[key]

    # -- records

    def adopt_records(self, other: DetectionData) -> None:
        """Take over the source and what was read of it from data with other sizes, to read nothing twice."""
        self.source, self._classes, self._held_out = other.source, other._classes, other._held_out
        self.checked, self.summary, self._records = other.checked, other.summary, other._records
        self._evaluated, self._unlabeled_records = other._evaluated, other._unlabeled_records

    def records(self, split: Split) -> Records:
        """Return the checked records of a split, limited by `fraction`, `limit` and `limit_eval`."""
        if split not in self._records:
            records = self._read(split)
            if not self._drawn:
                for other, known in self._records.items():
                    check_overlap({split: records, other: known}, self.on_overlap)
            self._records[split] = records
        return self._records[split]

    def _read_source(self, split: Split) -> tuple[Sequence[str], Sequence[Record]]:
        if not (self._is_val_held_out and split in ("train", "val")):
            return self.source.read_split(split)
        classes, annotated = self.source.read_split("train")
        records = pack_records(annotated)
        if self._held_out is None:
            similar = self.val_group_similar and not self._drawn
            files = records.files.texts()
            self._held_out = hold_out_images(files, self.val_fraction, self.val_seed, similar, self.max_pixels)
        held_out = self._held_out.images
        if split == "val" and not held_out.any():
            raise DistillError(
                f"The data has no val split, and its {len(records)} training images are too few to split some off. "
                "Name a validation split, or add images."
            )
        if split == "val":
            self.summary.append(
                f"val: the data has no such split, so {held_out.sum()} of the {len(records)} training images are split "
                f"off for it, {self._held_out.describe()} (data.val_fraction)"
            )
        part = select_with_faults(records, held_out if split == "val" else ~held_out)
        if split == "train":
            part.remarks = records.remarks  # about the whole file, so they are counted once
        return classes, part

    def _read(self, split: Split) -> Records:
        classes, annotated = self._read_source(split)
        if self._classes not in (None, tuple(classes)):
            raise DistillError(
                f"Expected the same classes in every split, got {list(classes)} in {split} and "
                f"{list(self._classes or ())} before. Give all annotation files the same categories."
            )
        if self._classes is None:
            similar = describe_similar_names(classes)
            if similar and hasattr(self.source, "choice"):
                warnings.warn(similar, stacklevel=2)
        self._classes = tuple(classes)
        records, self.checked[split] = check_records(
            annotated, split, self.on_error, not self._drawn, self.masks, self.max_pixels
        )
        if records.crowd.all() and split != "train":
            warnings.warn(
                f"{split}: all {len(records.labels)} boxes are crowds (iscrowd=1), which AP ignores: nothing can be "
                "measured. Check 'iscrowd' in the annotations",
                stacklevel=2,
            )
        if split != "train" and self.has_unlabeled:
            self._evaluated[split] = records
        fraction, limit = (self.fraction, self.limit) if split == "train" else (1.0, self.limit_eval)
        part = records.select(select_subset(len(records), fraction, limit))
        used = "" if len(part) == len(records) else f"; {len(part)} of the images are used"
        self.summary.append(f"{self.checked[split]}{used}")
        return part

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _position(self) -> tuple[int, int]:
        """Return the trainer's counts: (epoch, number of its batches that this process has completed)."""
        assert self.trainer is not None
        loop: Any = self.trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.completed

    def _loader(
        self,
        images: ImageDataset | JointImages,
        sampler: BatchSampler,
        position: Callable[[], tuple[int, int]] | None = None,
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
            generator=torch.Generator(),  # else each iterator would draw from the global stream, which the models use
        )


def _validate_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise DistillError(f"data.{name}: expected one of {', '.join(known)}, got {value!r}.")
