"""distill: a large, accurate object detector trains a small, fast one.

Every public name is ``distill.<Name>``. A name is imported on first use, so ``import distill`` loads neither
torchvision nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "ADL": "losses.adl",
    "AT": "losses.at",
    "BCKD": "losses.bckd",
    "Batch": "types",
    "BestCheckpoint": "training.callbacks.checkpoints",
    "CWD": "losses.cwd",
    "CheckpointFiles": "training.checkpoint_io",
    "Chen": "losses.chen",
    "Classifier": "training.classifier",
    "Coco": "data.coco",
    "CocoMetric": "evaluation.coco",
    "CrossKD": "losses.crosskd",
    "DEIMv2": "detectors.deimv2",
    "DETRCorners": "losses.detr_corners",
    "DETRFeatures": "losses.detr_features",
    "DETRLogits": "losses.detr_logits",
    "DETRPoints": "losses.detr_points",
    "DFine": "detectors.dfine",
    "DICOD": "losses.dicod",
    "DIST": "losses.dist",
    "DSIG": "losses.dsig",
    "DeFeat": "losses.defeat",
    "DetectionData": "data.datamodule",
    "Detector": "detectors.base",
    "DetectorSpec": "types",
    "DistillError": "types",
    "DistillLoss": "losses.base",
    "Distiller": "training.distiller",
    "EpochLines": "training.callbacks.epoch_lines",
    "EpochProgressBar": "training.callbacks.progress_bar",
    "ExportedDetector": "export.exported",
    "FBKD": "losses.fbkd",
    "FCOS": "detectors.fcos",
    "FGD": "losses.fgd",
    "FGFI": "losses.fgfi",
    "FRS": "losses.frs",
    "FasterRCNN": "detectors.faster_rcnn",
    "Foundation": "losses.foundation",
    "FoundationModel": "training.foundation",
    "GlobalKnowledge": "losses.global_knowledge",
    "GradientBalance": "training.balance",
    "GradientShares": "training.callbacks.gradient_shares",
    "Hint": "losses.hint",
    "History": "training.callbacks.history",
    "LD": "losses.ld",
    "LastCheckpoint": "training.callbacks.checkpoints",
    "MGD": "losses.mgd",
    "MasKD": "losses.maskd",
    "MaskRCNN": "detectors.mask_rcnn",
    "Mimic": "losses.mimic",
    "NonFiniteGuard": "training.nonfinite",
    "PAD": "losses.pad",
    "PKD": "losses.pkd",
    "PredictionImages": "training.callbacks.prediction_images",
    "RFDETR": "detectors.rfdetr",
    "RTDETR": "detectors.rtdetr",
    "Response": "losses.response",
    "RetinaNet": "detectors.retinanet",
    "SSIM": "losses.ssim",
    "Schedule": "training.schedule",
    "ScheduleCheck": "training.callbacks.schedule_check",
    "Shapes": "data.shapes",
    "TADF": "losses.tadf",
    "Teacher": "teacher",
    "TeacherCheck": "training.callbacks.teacher_check",
    "TermCheck": "training.callbacks.term_check",
    "TorchDataset": "data.torch_dataset",
    "Voc": "data.voc",
    "VocMetric": "evaluation.voc",
    "WandbRun": "training.wandb_run",
    "WeightAverage": "training.callbacks.averaging",
    "Yolo": "data.yolo",
    "evaluate": "evaluation.evaluate",
    "load_detector": "detectors.registry",
    "model": "cli.config.options",
    "panel": "evaluation.pictures",
    "predict": "evaluation.predict",
    "save_safetensors": "detectors.student_files",
    "save_student": "detectors.student_files",
    "schedule": "cli.config.options",
}
"""Public name -> the module below ``distill`` that defines it."""

__all__ = sorted(_MODULES)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'distill' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"distill.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
