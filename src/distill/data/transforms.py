"""Transforms of pixels, boxes and masks in the workers: from a loaded image to a batch.

The order is augmentation (`augment`), resize, flip, photometric distortion, transforms of the user, padding. Random
numbers are those of `random_streams`. Images are (3, H, W) uint8 RGB tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from distill.data.augment import NO_AUGMENTATION, Augmentation, LoadedImage
from distill.data.buffers import BufferPool, WorkerBatch, wrap_images
from distill.data.own_transforms import OwnTransform, apply_transforms, validate_callables
from distill.data.random_streams import Purpose, Streams
from distill.data.rle import resize_masks
from distill.imaging.resizing import SHAPES, copy_padded, padded_size, resize_boxes, resize_image, resized_size
from distill.types import Batch, DistillError, MissingTargets, Size, Target

MIN_SIDE = 1e-2
"""Least side of a training target in resized pixels: the encoded size of a thinner box would be noise."""


class Sample(NamedTuple):
    """One image after resize and augmentation, not yet padded, with its target in the same pixels."""

    image: Tensor
    target: Target | None
    """None: the boxes of the image are not known."""
    original_size: Size
    id: int
    labeled: bool = True
    """Whether the detector's own losses see the image."""


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes (N, 4) xyxy horizontally in an image of this width."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def distort_colors(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply the photometric distortion of SSD (Liu et al. 2016). Each of five steps has probability one half.

    The steps are brightness 0.875-1.125, contrast 0.5-1.5 (before or after the color steps), saturation 0.5-1.5, hue
    +-0.05 of a turn, and a permutation of the channels. The ranges are those of torchvision's
    ``RandomPhotometricDistort``.
    """
    coins = rng.random(6) < 0.5
    brightness, contrast, saturation = rng.uniform([0.875, 0.5, 0.5], [1.125, 1.5, 1.5])
    hue, channels = rng.uniform(-0.05, 0.05), rng.permutation(3)
    contrast_first = coins[5]
    steps: list[tuple[bool, Callable[[Tensor], Tensor]]] = [
        (coins[0], lambda x: F.adjust_brightness(x, brightness)),
        (coins[1] and contrast_first, lambda x: F.adjust_contrast(x, contrast)),
        (coins[2], lambda x: F.adjust_saturation(x, saturation)),
        (coins[3], lambda x: F.adjust_hue(x, hue)),
        (coins[1] and not contrast_first, lambda x: F.adjust_contrast(x, contrast)),
        (coins[4], lambda x: x[torch.from_numpy(channels)]),
    ]
    for enabled, step in steps:
        if enabled:
            image = step(image)
    return image


@dataclass(frozen=True)
class Transform:
    """Makes the samples of one split. In training it augments them: a pure function of (seed, epoch, image id).

    Args:
        min_sizes: wanted lengths of the shorter side in pixels. With several, one is drawn per image and epoch.
        max_size: greatest length of the longer side in pixels.
        flip: probability of a horizontal flip.
        photometric: whether to distort colors.
        antialias: whether the resize applies a low-pass filter before it reduces the image.
        seed: seed of all random draws.
        augment: augmentation that moves boxes, before the resize.
        transforms: transforms of the user, after all others.
        shape: ``ratio`` or ``square``, see `imaging.resizing.ResizeOptions`.

    Raises:
        DistillError: a size or probability is out of range, options contradict each other, or a transform is no
            callable.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    flip: float = 0.0
    photometric: bool = False
    antialias: bool = False
    seed: int = 0
    augment: Augmentation = NO_AUGMENTATION
    transforms: Sequence[OwnTransform] = ()
    shape: str = "ratio"

    def __post_init__(self) -> None:
        if not self.min_sizes or min(self.min_sizes) < 1 or max(self.min_sizes) > self.max_size:
            raise DistillError(
                f"data: expected 1 <= min_size <= max_size, got min_size={list(self.min_sizes)}, "
                f"max_size={self.max_size}. Set data.min_size and data.max_size (pixels)."
            )
        if not 0 <= self.flip <= 1:
            raise DistillError(f"data.flip: expected a probability from 0 to 1, got {self.flip}.")
        validate_callables(self.transforms)
        if self.shape not in SHAPES:
            raise DistillError(f"data.resize: expected {' or '.join(SHAPES)}, got {self.shape!r}.")
        if self.shape == "square" and (len(self.min_sizes) > 1 or self.augment.mosaic or self.augment.scale_jitter):
            raise DistillError(
                "data.resize=square: all images of a batch need one size, which detectors without padding expect, got "
                f"data.min_size={list(self.min_sizes)}, data.augment.mosaic={self.augment.mosaic} and "
                f"data.augment.scale_jitter={self.augment.scale_jitter}. Give one size, and set "
                "data.augment.mosaic=0 and data.augment.scale_jitter=null."
            )

    def resize(self, image: Tensor) -> Tensor:
        """Resize an image without augmentation, see `fit`."""
        return resize_image(image, self.fit((image.shape[-2], image.shape[-1])), self.antialias)

    def fit(self, size: Size, choice: int = -1) -> Size:
        """Return (height, width) of an image of some size after the resize to ``min_sizes[choice]``."""
        return resized_size(size, self.min_sizes[choice], self.max_size, self.shape)

    def draw_partners(self, image_id: int, epoch: int, count: int) -> list[int]:
        """Return the indices, below ``count``, of the images that join an image in a mosaic. Usually there are none."""
        if not self.augment.is_on(epoch):
            return []
        return self.augment.draw_partners(Streams(self.seed, epoch, image_id), count)

    def __call__(
        self,
        image: Tensor,
        target: Target,
        original_size: Size,
        image_id: int,
        epoch: int,
        codes: Sequence[bytes] | None = None,
        partners: Sequence[LoadedImage] = (),
    ) -> Sample:
        """Make one sample.

        Args:
            image: (3, H, W) uint8, as decoded or already resized. An image resized before needs ``min_sizes`` with one
                entry.
            target: boxes in pixels of the original image.
            original_size: (height, width) of the original image.
            image_id: selects the random stream, together with the seed and ``epoch``.
            epoch: index of the epoch, from 0.
            codes: run-length code of each box's mask, at the original size; None: the sample has no masks.
            partners: the other images of a mosaic, see `draw_partners`.
        """
        streams = Streams(self.seed, epoch, image_id)
        rng = streams.open(Purpose.BASE)
        # Both numbers are always drawn, in this order, so that one option does not change the random numbers of
        # another.
        choice, mirrored = int(rng.integers(len(self.min_sizes))), bool(rng.random() < self.flip)
        fit = partial(self.fit, choice=choice)
        if self.augment.is_on(epoch):
            images = [LoadedImage(image, target, original_size, codes), *partners]
            image, target = self.augment(images, fit, self.antialias, streams)
            image = image.flip(-1) if mirrored else image
            boxes, masks = target.boxes, target.masks
        else:
            new = fit(original_size)
            image = resize_image(image, new, self.antialias, mirrored)
            boxes = resize_boxes(target.boxes, original_size, new)
            masks = None if codes is None else resize_masks(codes, original_size, new)
        if mirrored:
            boxes = flip_boxes(boxes, image.shape[-1])
            masks = None if masks is None else masks.flip(-1)
        if self.photometric and self.augment.covers(epoch):
            image = distort_colors(image, rng)
        target = Target(boxes, target.labels, masks)
        if self.transforms:
            image, target = apply_transforms(self.transforms, image, _drop_thin_boxes(target), streams)
        return Sample(image, _drop_thin_boxes(target), original_size, image_id)


def _drop_thin_boxes(target: Target) -> Target:
    keep = (target.boxes[:, 2:] - target.boxes[:, :2]).amin(dim=1) >= MIN_SIDE
    return Target(target.boxes[keep], target.labels[keep], None if target.masks is None else target.masks[keep])


BUFFER_POOL = BufferPool()
"""The batch memory of this process."""
UNLABELED_POOL = BufferPool()
"""The memory of its unlabeled batches. In one pool, batches of two sizes would replace each other's buffers."""


def collate(samples: Sequence[Sample], pad_to: int = 32) -> Batch:
    """Pad the images with zeros to the right and below, and stack them to a Batch in channels-last layout.

    Samples that are not labeled make the batch `Batch.unlabeled`.
    """
    labeled = [sample for sample in samples if sample.labeled]
    unlabeled = [sample for sample in samples if not sample.labeled]
    return _stack(labeled, pad_to, BUFFER_POOL, _stack(unlabeled, pad_to, UNLABELED_POOL) if unlabeled else None)


def _stack(samples: Sequence[Sample], pad_to: int, pool: BufferPool, unlabeled: Batch | None = None) -> Batch:
    sizes = tuple((sample.image.shape[-2], sample.image.shape[-1]) for sample in samples)
    shape = (len(samples), *padded_size(sizes, pad_to), 3)
    in_worker = get_worker_info() is not None
    buffer = pool.acquire(math.prod(shape), shared=in_worker)
    images = buffer[: math.prod(shape)].view(shape).permute(0, 3, 1, 2) if in_worker else wrap_images(buffer, shape)
    copy_padded((sample.image for sample in samples), images)
    original_sizes, ids = tuple(sample.original_size for sample in samples), tuple(sample.id for sample in samples)
    known = tuple(sample.target for sample in samples if sample.target is not None)
    targets = known if len(known) == len(samples) else MissingTargets()
    if in_worker:
        return WorkerBatch(images, sizes, original_sizes, targets, ids, buffer, unlabeled=unlabeled)
    return Batch(images, sizes, original_sizes, targets, ids, unlabeled=unlabeled)
