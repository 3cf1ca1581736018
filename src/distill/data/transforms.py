"""Pixels, boxes and masks on the workers: one resize for both models, flips, photometric distortion, padding.

The size rule is that of torchvision's detection models: ``scale = min(min_size / shorter, max_size / longer)``, new
side ``floor(side * scale)``, bilinear, no antialiasing unless asked for (their COCO weights were trained and measured
without it). Unlike theirs, the result is uint8, rounded once per axis: less than one grey level apart.

What augmentation draws is a pure function of (seed, epoch, image id): workers, processes, batch size and order of
reading change nothing. Images are (3, H, W) uint8 RGB tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distill.data import rle
from distill.data.buffers import BufferPool, WorkerBatch, wrap_images
from distill.types import Batch, DistillError, Size, Target

MIN_SIDE = 1e-2
"""Boxes thinner than this many resized pixels are no training targets: their encoded sizes would be noise."""


class Sample(NamedTuple):
    """One image made ready: resized and augmented, not yet padded."""

    image: Tensor
    target: Target
    original_size: Size
    id: int


def sample_generator(seed: int, epoch: int, image_id: int) -> np.random.Generator:
    """The image's own random stream in this epoch, counter-based (Philox), equal on every worker and process."""
    words = [word % 2**64 for word in (epoch, image_id)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=words)))


def resized_size(size: Size, min_size: int, max_size: int) -> Size:
    """(height, width) after the resize; no side falls below one pixel."""
    scale = min(min_size / min(size), max_size / max(size))
    height, width = (max(1, math.floor(side * scale)) for side in size)
    return height, width


def resize_image(image: Tensor, size: Size, antialias: bool = False, mirrored: bool = False) -> Tensor:
    """Bilinear resize of a uint8 image to (height, width), mirrored if so wanted.

    Mirroring before and after gives the same bits where torch weighs in whole numbers (x86), so the smaller image is mirrored.
    """
    grows = image.shape[-2] < size[0]
    if mirrored and grows:
        image = image.flip(-1)
    if image.shape[-2:] != size:
        image = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)
    return image.flip(-1) if mirrored and not grows else image


def resize_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Boxes (N, 4) xyxy scaled by the exact ratio of the sides, which the floor makes differ a little per axis."""
    height, width = (after / before for before, after in zip(old, new, strict=True))
    return boxes * torch.tensor([width, height, width, height])


def resize_masks(codes: Sequence[bytes], old: Size, new: Size) -> Tensor:
    """Masks (N, h, w) uint8 at a new size by the nearest pixel, as torchvision's detectors resize them.

    One by one, so that no more than one is ever held at the size of the original image.
    """
    masks = torch.empty(len(codes), *new, dtype=torch.uint8)
    for row, code in zip(masks, codes, strict=True):
        row.copy_(interpolate(rle.decode_mask(code, old)[None, None], size=new, mode="nearest")[0, 0])
    return masks


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes (N, 4) xyxy in an image of this width."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def distort_colors(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Photometric distortion of SSD (Liu et al. 2016): each of five steps with probability one half.

    Brightness 0.875-1.125, contrast 0.5-1.5 (before or after the colour steps), saturation 0.5-1.5, hue +-0.05 of a
    turn, and a permutation of the channels: the ranges of torchvision's ``RandomPhotometricDistort``.
    """
    coins = rng.random(6) < 0.5
    brightness, contrast, saturation = rng.uniform([0.875, 0.5, 0.5], [1.125, 1.5, 1.5])
    hue, order = rng.uniform(-0.05, 0.05), rng.permutation(3)
    early = coins[5]
    steps: list[tuple[bool, Callable[[Tensor], Tensor]]] = [
        (coins[0], lambda x: F.adjust_brightness(x, brightness)),
        (coins[1] and early, lambda x: F.adjust_contrast(x, contrast)),
        (coins[2], lambda x: F.adjust_saturation(x, saturation)),
        (coins[3], lambda x: F.adjust_hue(x, hue)),
        (coins[1] and not early, lambda x: F.adjust_contrast(x, contrast)),
        (coins[4], lambda x: x[torch.from_numpy(order)]),
    ]
    for taken, step in steps:
        if taken:
            image = step(image)
    return image


@dataclass(frozen=True)
class Transform:
    """Resize, and in training flip and distort, as a pure function of (seed, epoch, image id).

    Args:
        min_sizes: wanted shorter sides in pixels; in training one is drawn per image and epoch.
        max_size: cap of the longer side in pixels.
        flip: probability of a horizontal flip.
        photometric: whether colours are distorted.
        antialias: whether the resize filters before it shrinks.
        seed: of all draws.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    flip: float = 0.0
    photometric: bool = False
    antialias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.min_sizes or min(self.min_sizes) < 1 or max(self.min_sizes) > self.max_size:
            raise DistillError(
                f"data: expected 1 <= min_size <= max_size, got min_size={list(self.min_sizes)}, "
                f"max_size={self.max_size}. Set data.min_size and data.max_size (pixels)."
            )
        if not 0 <= self.flip <= 1:
            raise DistillError(f"data.flip is a probability from 0 to 1, got {self.flip}.")

    def resize(self, image: Tensor, min_size: int | None = None) -> Tensor:
        """The resized image, without augmentation."""
        old = (image.shape[-2], image.shape[-1])
        new = resized_size(old, min_size or self.min_sizes[-1], self.max_size)
        return resize_image(image, new, self.antialias)

    def __call__(
        self,
        image: Tensor,
        target: Target,
        original_size: Size,
        image_id: int,
        epoch: int,
        codes: Sequence[bytes] | None = None,
    ) -> Sample:
        """Make one sample.

        Args:
            image: (3, H, W) uint8, as decoded or already resized (then ``min_sizes`` has one entry).
            target: boxes in pixels of the original image.
            original_size: (height, width) that the boxes refer to.
            image_id: names the random stream, together with the seed and ``epoch``.
            epoch: counts from 0.
            codes: the run-length code of each box's mask, at the original size; None: the sample has no masks.
        """
        rng = sample_generator(self.seed, epoch, image_id)
        # Always drawn, in this order: switching one option on leaves the draws of the others as they were.
        choice, mirrored = int(rng.integers(len(self.min_sizes))), bool(rng.random() < self.flip)
        new = resized_size(original_size, self.min_sizes[choice], self.max_size)
        image = resize_image(image, new, self.antialias, mirrored)
        boxes = resize_boxes(target.boxes, original_size, new)
        masks = None if codes is None else resize_masks(codes, original_size, new)
        if mirrored:
            boxes = flip_boxes(boxes, new[1])
            masks = None if masks is None else masks.flip(-1)
        if self.photometric:
            image = distort_colors(image, rng)
        keep = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= MIN_SIDE
        kept = Target(boxes[keep], target.labels[keep], None if masks is None else masks[keep])
        return Sample(image, kept, original_size, image_id)


def padded_size(sizes: Sequence[Size], pad_to: int) -> Size:
    """The smallest (height, width) that holds all of these sizes and is a multiple of ``pad_to``."""
    height, width = (math.ceil(max(sides) / pad_to) * pad_to for sides in zip(*sizes, strict=True))
    return height, width


BUFFER_POOL = BufferPool()
"""Of this process."""


def collate(samples: Sequence[Sample], pad_to: int = 32) -> Batch:
    """Pad with zeros to the right and below, and stack: samples -> Batch, its channels last in memory."""
    sizes = tuple((sample.image.shape[-2], sample.image.shape[-1]) for sample in samples)
    shape = (len(samples), *padded_size(sizes, pad_to), 3)
    worker = get_worker_info() is not None
    piece = BUFFER_POOL.acquire(math.prod(shape), shared=worker)
    images = piece[: math.prod(shape)].view(shape).permute(0, 3, 1, 2) if worker else wrap_images(piece, shape)
    for canvas, sample, (height, width) in zip(images, samples, sizes, strict=True):
        canvas[:, :height, :width] = sample.image
        canvas[:, height:] = 0
        canvas[:, :height, width:] = 0
    original_sizes, ids = tuple(sample.original_size for sample in samples), tuple(sample.id for sample in samples)
    targets = tuple(sample.target for sample in samples)
    if worker:
        return WorkerBatch(images, sizes, original_sizes, targets, ids, piece)
    return Batch(images, sizes, original_sizes, targets, ids)
