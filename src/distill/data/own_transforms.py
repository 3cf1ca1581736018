"""Transforms of the user: callables ``(image, target) -> (image, target)``, such as those of torchvision's v2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from distill.data.random_streams import Purpose, Streams, seed_globals
from distill.types import DistillError, Target

OwnTransform = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]
"""Takes and returns an image and its target.

The image is a `tv_tensors.Image` (3, h, w), uint8, after the resize. The target has ``boxes``
(`tv_tensors.BoundingBoxes` (N, 4), xyxy in pixels of this image), ``labels`` (N,) int64 from 1 and, with `data.masks`,
``masks`` (`tv_tensors.Mask` (N, h, w) of 0 and 1).
"""


def validate_callables(transforms: Any) -> None:
    """Refuse a value of `data.transforms` that is no list of callables.

    Raises:
        DistillError: names the entry.
    """
    if not isinstance(transforms, (list, tuple)):
        raise DistillError(
            f"data.transforms: expected a list of transforms, got {transforms!r}. Write one transform as [{{…}}]."
        )
    for index, transform in enumerate(transforms):
        if not callable(transform) or isinstance(transform, type):
            raise DistillError(
                f"data.transforms[{index}]: expected a callable (image, target) -> (image, target), got {transform!r}. "
                "Give a mapping with _target_, such as {_target_: torchvision.transforms.v2.RandomGrayscale, p: 0.5}; "
                "for a function, add _partial_: true."
            )


def apply_transforms(
    transforms: Sequence[OwnTransform], image: Tensor, target: Target, streams: Streams
) -> tuple[Tensor, Target]:
    """Apply transforms in their order. Boxes of the result are clipped to the image.

    The transforms may draw from the global random numbers of torch, NumPy and Python. These are seeded before the first
    transform, and restored after the last.

    Args:
        transforms: the callables.
        image: (3, h, w) uint8. It is copied, so a transform may change it in place.
        target: boxes, labels and masks in pixels of the image.
        streams: random numbers of the image.

    Raises:
        DistillError: a transform failed, or returned another type or shape.
    """
    height, width = image.shape[-2:]
    content: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=(height, width)),
        "labels": target.labels,
    }
    if target.masks is not None:
        content["masks"] = tv_tensors.Mask(target.masks)
    picture: Any = tv_tensors.Image(image.clone())
    with seed_globals(streams.open(Purpose.OWN)):
        for index, transform in enumerate(transforms):
            name = f"data.transforms[{index}] ({getattr(transform, '__name__', type(transform).__name__)})"
            try:
                returned = transform(picture, content)
            except Exception as error:
                raise DistillError(f"{name} failed for image {streams.image_id}: {error!r}") from error
            picture, content = _validate_result(returned, target.masks is not None, name)
    image, boxes = picture.as_subclass(Tensor), content["boxes"]
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = F.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    height, width = image.shape[-2:]
    boxes = boxes.as_subclass(Tensor).float()
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2))
    masks = None if target.masks is None else content["masks"].as_subclass(Tensor).to(torch.uint8)
    return image, Target(boxes, content["labels"].as_subclass(Tensor), masks)


def _validate_result(returned: Any, has_masks: bool, name: str) -> tuple[Tensor, dict[str, Any]]:
    """Return the image and the target that a transform returned.

    Raises:
        DistillError: the types or shapes are not those of `OwnTransform`.
    """
    if not (isinstance(returned, (tuple, list)) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise DistillError(f"{name}: expected a result (image, target), got {type(returned).__name__}.")
    image, target = returned[0], dict(returned[1])
    if not (isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3):
        raise DistillError(
            f"{name}: expected an image (3, h, w) uint8, got {_describe(image)}. Leave out ToDtype and Normalize: "
            "detectors normalize images themselves."
        )
    if not image.numel():
        raise DistillError(f"{name}: expected an image of at least one pixel, got {_describe(image)}.")
    boxes, labels, masks = (target.get(key) for key in ("boxes", "labels", "masks"))
    if not (isinstance(boxes, Tensor) and boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.isfinite().all()):
        raise DistillError(f"{name}: expected target['boxes'] (N, 4) of finite numbers, got {_describe(boxes)}.")
    count = len(boxes)
    if not (
        isinstance(labels, Tensor)
        and labels.dtype == torch.int64
        and labels.shape == (count,)
        and all(label >= 1 for label in labels.tolist())
    ):
        raise DistillError(f"{name}: expected target['labels'] ({count},) int64 from 1, got {_describe(labels)}.")
    size = (count, *image.shape[-2:])
    if has_masks and not (isinstance(masks, Tensor) and masks.shape == size):
        raise DistillError(f"{name}: expected target['masks'] {size}, got {_describe(masks)}.")
    return image, target


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
