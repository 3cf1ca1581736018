"""Small distillers, and their training in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.evaluation.coco import CocoMetric
from distill.losses.base import DistillLoss
from distill.teacher import Teacher
from distill.training.distiller import Distiller
from distill.training.schedule import Schedule
from distill.types import View
from helpers.detectors import FAMILIES, small_options

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
ANCHORS = [[8], [16], [32], [64], [128]]
FEW = {
    "rpn_pre_nms_top_n_train": 40,
    "rpn_post_nms_top_n_train": 20,
    "rpn_pre_nms_top_n_test": 300,
    "rpn_post_nms_top_n_test": 100,
    "box_batch_size_per_image": 16,
    "head_channels": 32,
    "anchor_sizes": ANCHORS,
}
EVERYTHING = {
    "backbone": {"foreground": 1.0, "background": 1.0},
    "proposals": {"positive": 1.0, "negative": 1.0, "all": 1.0, "subsample_negatives": True},
}


def small_detector(family: str = "faster_rcnn", seed: int = 0, classes: Sequence[str] = CLASSES, **options: Any) -> Any:
    """A small detector whose heads are not silent."""
    torch.manual_seed(seed)
    row = FAMILIES[family]
    settings = {"score_thresh": 0.0, "min_size": 64, "max_size": 64, **options}
    detector: Any = row.detector(classes, **small_options(family, FEW, **settings))
    for layer in detector.class_layers:
        nn.init.normal_(detector.net.get_submodule(layer).weight, std=0.01)
    for layer in row.box_layers[:1]:
        nn.init.constant_(detector.net.get_submodule(layer).bias, 1.5)
    return detector


def shapes_data(train: int = 8, source: Any = None, **options: Any) -> DetectionData:
    source = source or Shapes(train=train, val=4, test=0, size=64)
    return DetectionData(source, **{"batch_size": 4, "workers": 0, "min_size": 64, "max_size": 64, **options})


def small_teacher(seed: int = 1, **options: Any) -> Teacher:
    return Teacher(small_detector(seed=seed, **{"width": 0.5, "neck_channels": 24, **options}))


def sgd(lr: float = 0.02, **options: Any) -> Schedule:
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4)
    return Schedule(**{"optimizer": optimizer, "shape": "constant", "warmup_steps": 0, **options})


def distiller(
    student: Any = None,
    teacher: Teacher | None = None,
    losses: Mapping[str, Callable[..., DistillLoss]] | None = None,
    **options: Any,
) -> Distiller:
    """Losses are given as constructors that take the specs of both detectors."""
    student = student or small_detector()
    teacher = teacher or (small_teacher() if losses else None)
    built = {name: make(student.spec, teacher.spec) for name, make in (losses or {}).items()} if teacher else {}
    settings: dict[str, Any] = {"schedule": sgd(), "metrics": [CocoMetric], **options}
    return Distiller(student, teacher, built, **settings)


def fit(
    module: Distiller, folder: Path, data: DetectionData | None = None, ckpt_path: Path | None = None, **options: Any
) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "default_root_dir": folder,
        **options,
    }
    trainer = L.Trainer(**settings)
    trainer.fit(module, data or shapes_data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


class FormulaLoss(DistillLoss):
    """A loss whose only term is whatever `formula` makes of the two Views."""

    def __init__(
        self, student: Any, teacher: Any, formula: Callable[[View, View], Tensor], weight: float = 1.0
    ) -> None:
        super().__init__({"term": weight})
        self.formula = formula

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        return {"term": self.formula(student, teacher)}


def half_precision(scale: float, interval: int = 2000) -> MixedPrecision:
    """16-mixed with a scaler on the CPU, where Lightning would use bf16. The scale grows every `interval` steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)  # type: ignore[attr-defined]
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)
