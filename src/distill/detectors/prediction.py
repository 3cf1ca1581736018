"""Detections of a detector in images of any kind: tensors, arrays, PIL images and files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.imaging.conversion import as_tensor
from distill.imaging.resizing import ResizeOptions, copy_padded, padded_size, resize_image, resized_size
from distill.types import Batch, Detections, Size, Target


class Prediction(NamedTuple):
    """Detections in one image, best first, on the CPU."""

    boxes: Tensor
    """(N, 4) xyxy in pixels of the given image."""
    scores: Tensor
    """(N,) in [0, 1]."""
    labels: Tensor
    """(N,) from 1 to K."""
    names: list[str]
    """Class names of the N detections."""
    masks: Tensor | None = None
    """(N, H, W) bool, or None without a mask head."""


class _Resized(NamedTuple):
    number: int
    image: Tensor
    original_size: Size


def predict_images(
    images: Iterable[Any],
    detect: Callable[[Batch], list[Detections]],
    classes: Sequence[str],
    limits: tuple[int, int],
    resize: ResizeOptions,
    score: float,
    batch_size: int,
) -> list[Prediction]:
    """Detect objects in images.

    Args:
        images: images of any kind, see `imaging.conversion`.
        detect: returns the detections of a batch, in pixels of the original images.
        classes: class names in label order.
        limits: wanted length of the shorter side, and greatest length of the longer side.
        resize: the other options of the resize.
        score: lowest score of a detection.
        batch_size: images of one size after resize and padding that are computed together.

    Raises:
        DistillError: an image cannot be read.
    """
    results: dict[int, Prediction] = {}
    waiting: dict[Size, list[_Resized]] = defaultdict(list)

    def compute(group: list[_Resized]) -> None:
        for item, found in zip(group, detect(make_batch(group, resize.pad_to)), strict=True):
            results[item.number] = to_prediction(found, classes, score)
        group.clear()

    for number, given in enumerate(images):
        image = as_tensor(given, number)
        original = (image.shape[-2], image.shape[-1])
        size = resized_size(original, *limits, resize.shape)
        group = waiting[padded_size([size], resize.pad_to)]
        group.append(_Resized(number, resize_image(image, size, resize.antialias), original))
        if len(group) == batch_size:
            compute(group)
    for group in waiting.values():
        if group:
            compute(group)
    return [results[number] for number in range(len(results))]


def make_batch(group: Sequence[_Resized], pad_to: int) -> Batch:
    """Pad resized images, and stack them to a Batch without targets."""
    sizes = tuple((item.image.shape[-2], item.image.shape[-1]) for item in group)
    images = torch.empty(len(group), 3, *padded_size(sizes, pad_to), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    copy_padded((item.image for item in group), images)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    originals, ids = tuple(item.original_size for item in group), tuple(item.number for item in group)
    return Batch(images, sizes, originals, (empty,) * len(group), ids)


def to_prediction(found: Detections, classes: Sequence[str], score: float) -> Prediction:
    """Return the detections from a score on, with their class names, on the CPU."""
    kept = found.scores >= score
    labels = found.labels[kept].cpu()
    names = [classes[label - 1] for label in labels.tolist()]
    masks = None if found.masks is None else found.masks[kept].cpu()
    return Prediction(found.boxes[kept].cpu(), found.scores[kept].cpu(), labels, names, masks)
