"""A small Faster R-CNN for the tests of measurements."""

from __future__ import annotations

from typing import Any

import torch

from distill.data.shapes import CLASSES
from distill.detectors.faster_rcnn import FasterRCNN
from helpers.detectors import nested

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "depth": 10,
    "width": 0.25,
    "neck_channels": 16,
    "head_channels": 16,
    "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20,
    "box_batch_size_per_image": 16,
    "min_size": 64,
    "max_size": 64,
}


def detector(seed: int = 0, **options: Any) -> FasterRCNN:
    torch.manual_seed(seed)
    return FasterRCNN(list(CLASSES), **nested({**SMALL, **options}))
