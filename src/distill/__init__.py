"""distill: a large, accurate object detector trains a small, fast one.

The names below are imported when they are first used, so that ``import distill`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Batch": "types",
    "Best": "callbacks.resume",
    "CheckpointFiles": "callbacks.storage",
    "CocoMetric": "metrics.coco",
    "Coco": "data.coco",
    "DeFeat": "losses.defeat",
    "DetectionData": "data.datamodule",
    "DistillError": "types",
    "Distiller": "module",
    "FCOS": "detectors.anchor_free",
    "FGFI": "losses.fgfi",
    "FasterRCNN": "detectors.two_stage",
    "Guest": "guest",
    "Last": "callbacks.resume",
    "MaskRCNN": "detectors.mask_rcnn",
    "Mimic": "losses.mimic",
    "PAD": "losses.pad",
    "RetinaNet": "detectors.one_stage",
    "SSIM": "losses.ssim",
    "Schedule": "optimization",
    "Shapes": "data.shapes",
    "Voc": "data.voc",
    "VocMetric": "metrics.voc",
    "evaluate": "evaluation",
    "load_detector": "detectors.checkpoints",
    "panel": "pictures",
    "save_student": "detectors.checkpoints",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"distill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
