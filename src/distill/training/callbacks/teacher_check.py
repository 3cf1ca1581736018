"""Measures the teacher before the first step, to detect a teacher whose weights do not fit."""

from __future__ import annotations

import warnings

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from distill.evaluation.evaluate import evaluate
from distill.labels import unknown_classes
from distill.training.distiller import Distiller
from distill.training.lightning_compat import data_module
from distill.types import DistillError
from distill.units import percent

AP_NAMES = ("val/shared_AP", "val/shared_mAP", "val/AP", "val/mAP")
"""Values that are compared with `min_ap`; the first one that was measured."""


class TeacherCheck(L.Callback):
    """Measures the teacher on the validation split if its AP is not known yet, and warns if the AP is low.

    Args:
        evaluate: measure the teacher; ``False`` skips the evaluation.
        min_ap: warn below this AP, 0 to 1.
    """

    def __init__(self, evaluate: bool = True, min_ap: float | None = None) -> None:
        self.evaluate = evaluate
        self.min_ap = min_ap

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the first step, also after a resume."""
        assert isinstance(pl_module, Distiller)
        teacher = pl_module.teacher
        if teacher is None:
            return
        if self.evaluate and not teacher.values:
            data = data_module(trainer)
            unknown = unknown_classes(teacher.spec.data_classes, data.classes)
            try:
                metrics = evaluate(teacher.detector, data, "val", pl_module.metrics, pl_module.device, "teacher, val")
            except DistillError as error:
                warnings.warn(f"the teacher's AP is not known: {error}", stacklevel=2)
                return
            teacher.values = {f"val/{name}": value for name, value in metrics.items()}
            if unknown:
                rank_zero_warn(
                    f"the teacher does not know {', '.join(unknown)}: these classes count 0 in its AP. Its values on "
                    "the shared classes are named shared_"
                )
        ap = next((teacher.values[name] for name in AP_NAMES if name in teacher.values), None)
        if ap is not None and self.min_ap is not None and ap < self.min_ap:
            warnings.warn(
                f"the teacher's AP is {percent(ap)} %, below teacher.min_ap={self.min_ap}: check its weights, its "
                f"class list and the image size (data.min_size) that it was trained with ({teacher.source})",
                stacklevel=2,
            )
