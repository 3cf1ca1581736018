"""Transforms of pixels, boxes and masks in the workers: resize, flip, photometric distortion, padding.

Student and teacher share one resize. Its size rule is that of torchvision's detection models: with ``scale =
min(min_size / shorter, max_size / longer)``, the new side is ``floor(side * scale)``. The interpolation is bilinear, by
default without antialiasing, because torchvision's COCO weights were trained and measured without it. Unlike
torchvision's, the result is uint8, rounded once per axis: the difference is less than one gray level.

The random numbers of the augmentation are a pure function of (seed, epoch, image id). The numbers of workers and
processes, the batch size and the order of loading do not change them. Images are (3, H, W) uint8 RGB tensors.
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
"""Least side of a training target in resized pixels: the encoded size of a thinner box would be noise."""


class Sample(NamedTuple):
    """One image after resize and augmentation, not yet padded, with its target in the same pixels."""

    image: Tensor
    target: Target
    original_size: Size
    id: int


def sample_generator(seed: int, epoch: int, image_id: int) -> np.random.Generator:
    """Return the random stream of one image in one epoch, equal in every worker and process (Philox, counter-based)."""
    spawn_key = [number % 2**64 for number in (epoch, image_id)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=spawn_key)))


def resized_size(size: Size, min_size: int, max_size: int) -> Size:
    """Return (height, width) after the resize. No side is below one pixel.

    Args:
        size: (height, width) of the original image.
        min_size: wanted length of the shorter side.
        max_size: greatest length of the longer side. It takes precedence over ``min_size``.
    """
    scale = min(min_size / min(size), max_size / max(size))
    height, width = (max(1, math.floor(side * scale)) for side in size)
    return height, width


def resize_image(image: Tensor, size: Size, antialias: bool = False, mirrored: bool = False) -> Tensor:
    """Resize a uint8 image to (height, width) by bilinear interpolation, and optionally mirror it.

    The smaller of the two images is mirrored, which is faster. Mirroring before or after the resize gives the same bits
    where torch interpolates with integer weights (x86).
    """
    enlarges = image.shape[-2] < size[0]
    if mirrored and enlarges:
        image = image.flip(-1)
    if image.shape[-2:] != size:
        image = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)
    return image.flip(-1) if mirrored and not enlarges else image


def resize_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Scale boxes (N, 4) xyxy from an image of size ``old`` to one of size ``new``.

    Each axis has its own ratio, because the size rule rounds each side down.
    """
    y_scale, x_scale = (after / before for before, after in zip(old, new, strict=True))
    return boxes * torch.tensor([x_scale, y_scale, x_scale, y_scale])


def resize_masks(codes: Sequence[bytes], old: Size, new: Size) -> Tensor:
    """Decode masks and resize them to (N, h, w) uint8 by the nearest pixel, as torchvision's detectors do.

    Masks are processed one by one, so memory holds only one mask at the size of the original image.

    Args:
        codes: N run-length codes of masks of size ``old``.
        old: (height, width) of the original image.
        new: (height, width) of the result.
    """
    masks = torch.empty(len(codes), *new, dtype=torch.uint8)
    for row, code in zip(masks, codes, strict=True):
        row.copy_(interpolate(rle.decode_mask(code, old)[None, None], size=new, mode="nearest")[0, 0])
    return masks


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
    """Resizes an image and, in training, flips it and distorts its colors: a pure function of (seed, epoch, image id).

    Args:
        min_sizes: wanted lengths of the shorter side in pixels. With several, one is drawn per image and epoch.
        max_size: greatest length of the longer side in pixels.
        flip: probability of a horizontal flip.
        photometric: whether to distort colors.
        antialias: whether the resize applies a low-pass filter before it reduces the image.
        seed: seed of all random draws.

    Raises:
        DistillError: a size or probability is out of range.
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
            raise DistillError(f"data.flip: expected a probability from 0 to 1, got {self.flip}.")

    def resize(self, image: Tensor, min_size: int | None = None) -> Tensor:
        """Resize an image without augmentation. ``min_size`` defaults to the last of ``min_sizes``."""
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
            image: (3, H, W) uint8, as decoded or already resized. An image resized before needs ``min_sizes`` with one
                entry.
            target: boxes in pixels of the original image.
            original_size: (height, width) of the original image.
            image_id: selects the random stream, together with the seed and ``epoch``.
            epoch: index of the epoch, from 0.
            codes: run-length code of each box's mask, at the original size; None: the sample has no masks.
        """
        rng = sample_generator(self.seed, epoch, image_id)
        # Both numbers are always drawn, in this order, so that one option does not change the random numbers of
        # another.
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
    """Return the smallest (height, width) that holds all sizes. Both sides are multiples of ``pad_to``."""
    height, width = (math.ceil(max(sides) / pad_to) * pad_to for sides in zip(*sizes, strict=True))
    return height, width


BUFFER_POOL = BufferPool()
"""The batch memory of this process."""


def collate(samples: Sequence[Sample], pad_to: int = 32) -> Batch:
    """Pad the images with zeros to the right and below, and stack them to a Batch in channels-last layout."""
    sizes = tuple((sample.image.shape[-2], sample.image.shape[-1]) for sample in samples)
    shape = (len(samples), *padded_size(sizes, pad_to), 3)
    in_worker = get_worker_info() is not None
    buffer = BUFFER_POOL.acquire(math.prod(shape), shared=in_worker)
    images = buffer[: math.prod(shape)].view(shape).permute(0, 3, 1, 2) if in_worker else wrap_images(buffer, shape)
    for canvas, sample, (height, width) in zip(images, samples, sizes, strict=True):
        canvas[:, :height, :width] = sample.image
        canvas[:, height:] = 0
        canvas[:, :height, width:] = 0
    original_sizes, ids = tuple(sample.original_size for sample in samples), tuple(sample.id for sample in samples)
    targets = tuple(sample.target for sample in samples)
    if in_worker:
        return WorkerBatch(images, sizes, original_sizes, targets, ids, buffer)
    return Batch(images, sizes, original_sizes, targets, ids)
