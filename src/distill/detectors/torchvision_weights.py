"""The published weights of torchvision: entries of its enums, their class names, the download, and downloaded files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torchvision

from distill.detectors.base import Detector
from distill.detectors.class_layers import count_outputs
from distill.detectors.state_dicts import State
from distill.types import DistillError


class NoWeights(Enum):
    """Stands for torchvision's enum in a family of which torchvision publishes no weights."""


OTHER_PARTS = {
    **dict.fromkeys(
        ("FasterRCNN_MobileNet_V3_Large_FPN_Weights", "FasterRCNN_MobileNet_V3_Large_320_FPN_Weights"),
        "a pyramid of three levels, the finest at stride 32, with 15 anchors per cell",
    ),
    **dict.fromkeys(("SSD300_VGG16_Weights", "SSDLite320_MobileNet_V3_Large_Weights"), "the heads of an SSD"),
    "KeypointRCNN_ResNet50_FPN_Weights": "a head for keypoints",
}
"""Enum of torchvision's detectors that no family of distill can express -> the part that is missing here."""

_RCNN_2: dict[str, Any] = {"neck_norm": "batch", "rpn_convs": 2, "box_convs": 4, "head_norm": "batch"}
VERSION_2: dict[str, dict[str, Any]] = {
    "FasterRCNN_ResNet50_FPN_V2_Weights": _RCNN_2,
    "MaskRCNN_ResNet50_FPN_V2_Weights": _RCNN_2,
    "RetinaNet_ResNet50_FPN_V2_Weights": {"p6_from": "c5", "head_norm": "group"},
}
"""Enum of a detector of version 2 -> its options that differ from version 1."""
_VERSION_1: dict[str, Any] = {"neck_norm": "none", "rpn_convs": 1, "box_convs": 0, "head_norm": "none", "p6_from": "p5"}


def entry_options(entry: Any) -> dict[str, Any]:
    """The options of a detector's head and neck that torchvision's weights need."""
    kind = type(entry).__name__
    if kind.startswith("FCOS"):
        return {}
    return {**_VERSION_1, **VERSION_2.get(kind, {})}


def find_entry(source: str, enum: Any) -> Any:
    """torchvision's entry with the name `source`, or None if torchvision has no such entry.

    Raises:
        DistillError: no family of distill has the entry's detector.
    """
    if source in enum.__members__:
        return enum[source]
    try:
        entry = torchvision.models.get_weight(source)
    except (ValueError, KeyError):
        return None
    if part := OTHER_PARTS.get(type(entry).__name__):
        raise DistillError(
            f"{source}: this detector has {part}, which distill's detectors do not have. Choose COCO_V1 of a "
            "ResNet-50 detector: Faster R-CNN, Mask R-CNN or RetinaNet of version 1 or 2, or FCOS"
        )
    return entry


def categories(entry: Any) -> tuple[str, ...]:
    """Class names of torchvision's weights, without the first category, which is the background."""
    return tuple(entry.meta["categories"][1:])


def download(entry: Any, option: str) -> State:
    """Download torchvision's weights, or read them from torch's cache.

    Args:
        entry: a member of torchvision's enum.
        option: the constructor's option with which the user chose the entry, for the message. Configurations have
            it below ``model`` and, for the teacher, below ``teacher.model``. Their ``teacher.weights`` is the teacher's
            option ``weights``.

    Raises:
        DistillError: the weights cannot be fetched. The message says how to provide them without a network.
    """
    try:
        state: State = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or a broken download
        name = Path(entry.url).name
        keys = {
            "weights": ("model.weights", "teacher.weights"),
            "backbone.weights": ("model.backbone.weights", "teacher.model.backbone.weights"),
        }.get(option)
        student = f"{keys[0]}=/path/to/{name} (of the teacher: {keys[1]}=/path/to/{name})" if keys else ""
        raise DistillError(
            f"{option}: {entry} could not be fetched ({error}). Get {entry.url} on a machine with a network and set "
            f"{student or f'{option}=/path/to/{name}'}, or put it into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return state


def is_coco_state(detector: Detector, state: State) -> bool:
    """Return whether a state dict without class names has the labels of torchvision's COCO weights.

    This is so if it has their number of outputs. A detector with as many classes under other names decides otherwise:
    the file is then taken to have the detector's classes.
    """
    if detector.enum is NoWeights:
        return False
    names = categories(detector.enum.COCO_V1)
    if count_outputs(detector, state) != len(names) + 1:
        return False
    return len(detector.classes) != len(names) or set(detector.classes) <= set(names)


def coco_eps(detector: Detector, state: State, file: str) -> float:
    """Return the epsilon of the norms that a state dict of torchvision's COCO detector needs.

    torchvision's published COCO_V1 was trained with frozen norms, whose state dict has no ``num_batches_tracked``, and
    has an epsilon of its own, see `Detector.coco_eps`. Norms with batch statistics have 1e-5.
    """
    published = Path(detector.enum.COCO_V1.url).name == Path(file).name
    batch_norm = any(name.endswith(".num_batches_tracked") for name in state)
    return detector.coco_eps if published or not batch_norm else 1e-5
