"""Images for W&B and TensorBoard: ground truth, teacher and student side by side, after evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from distill.detectors.base import Detector
from distill.evaluation.pictures import panel
from distill.training.distiller import Distiller
from distill.training.lightning_compat import data_module
from distill.types import Batch, Detections, DistillError, Target


class PredictionImages(L.Callback):
    """Logs images after evaluations: to W&B with box overlays that can be switched, to TensorBoard as panels.

    Args:
        images: number of images, the first ones of the validation split.
        every: evaluations between two sets of images.
        score: minimum score of a shown detection.

    Raises:
        DistillError: ``images`` below 0 or ``every`` below 1.
    """

    def __init__(self, images: int = 8, every: int = 1, score: float = 0.3) -> None:
        if images < 0 or every < 1:
            raise DistillError(
                f"callbacks.panels: expected images from 0 and every from 1, got images={images} and every={every}; "
                "callbacks.panels=null switches it off"
            )
        self.images = images
        self.every = every
        self.score = score
        self._evaluations = 0

    def state_dict(self) -> dict[str, int]:
        """The number of evaluations, so that a resumed run logs after the same evaluations."""
        return {"seen": self._evaluations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of evaluations."""
        self._evaluations = state_dict["seen"]

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log images with the weights that were just evaluated."""
        assert isinstance(pl_module, Distiller)
        if trainer.sanity_checking:
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]
        self._evaluations += 1
        if not loggers or self.images == 0 or self._evaluations % self.every:
            return
        data = data_module(trainer)
        shown = min(self.images, len(data.ground_truth("val")["images"]))
        batch = data.load_batch("val", range(shown)).to(pl_module.device)
        columns = predict_columns(pl_module, batch)
        for number, image in enumerate(unpadded_images(batch)):
            boxes_by_column = {name: column[number] for name, column in columns.items()}
            for logger in loggers:
                log_image(
                    logger, f"val/{number}", image, boxes_by_column, data.classes, self.score, trainer.global_step
                )


def predict_columns(module: Distiller, batch: Batch) -> dict[str, Sequence[Target | Detections]]:
    """Column name -> boxes per image, in resized pixels: ground truth, teacher (if any) and student."""
    columns: dict[str, Sequence[Target | Detections]] = {"ground truth": batch.targets}
    resized = replace(batch, original_sizes=batch.sizes)  # so that detections, and their masks, are in resized pixels
    training = module.student.training
    module.student.eval()
    if module.teacher is not None:
        columns["teacher"] = module.teacher.view(resized, training=False).detections
    columns["student"] = module.student.view(resized, training=False, frozen=True).detections
    module.student.train(training)
    return columns


def compare_columns(
    columns: Mapping[str, Sequence[Target | Detections]], alone: Detector, batch: Batch
) -> dict[str, Sequence[Target | Detections]]:
    """The columns of `predict_columns` with those of the student alone, before the distilled student's.

    Args:
        columns: from `predict_columns`.
        alone: the same student, trained without distillation, in evaluation mode.
        batch: the images.
    """
    resized = replace(batch, original_sizes=batch.sizes)
    others = {name: boxes for name, boxes in columns.items() if name != "student"}
    alone_boxes = alone.view(resized, training=False, frozen=True).detections
    return {**others, "student alone": alone_boxes, "distilled student": columns["student"]}


def unpadded_images(batch: Batch) -> list[Tensor]:
    """The images without padding, on the CPU."""
    return [image[:, :height, :width].cpu() for image, (height, width) in zip(batch.images, batch.sizes, strict=True)]


def log_image(
    logger: Any,
    key: str,
    image: Tensor,
    boxes_by_column: Mapping[str, Target | Detections],
    classes: Sequence[str],
    score: float,
    step: int,
) -> None:
    """Log one image to one logger."""
    if isinstance(logger, WandbLogger):
        import wandb

        boxes = {
            name.replace(" ", "_"): wandb_boxes(column, classes, score) for name, column in boxes_by_column.items()
        }
        picture = wandb.Image(image.permute(1, 2, 0).numpy(), boxes=boxes)
        logger.experiment.log({key: picture, "trainer/global_step": step})
    else:
        import numpy as np

        drawn = np.asarray(panel(image, dict(boxes_by_column), classes, min_score=score))
        logger.experiment.add_image(key, drawn, step, dataformats="HWC")


def wandb_boxes(column: Target | Detections, classes: Sequence[str], score: float) -> dict[str, Any]:
    """One column as box overlays of W&B, colored by class; ground truth has score 1."""
    layer = box_layer(column, column.labels.tolist(), dict(enumerate(classes, start=1)), classes)
    return layer | {"box_data": [box for box in layer["box_data"] if box["scores"]["score"] >= score]}


def box_layer(
    column: Target | Detections, colors: Sequence[int], names: Mapping[int, str], classes: Sequence[str]
) -> dict[str, Any]:
    """Boxes as a layer of W&B. The caption of a box has its class and score.

    Args:
        column: boxes in pixels of the image.
        colors: a number per box, by which W&B colors it.
        names: color -> its meaning.
        classes: class names in label order.
    """
    scores = column.scores.tolist() if isinstance(column, Detections) else [1.0] * len(column.labels)
    rows = zip(column.boxes.tolist(), column.labels.tolist(), scores, colors, strict=True)
    data = [
        {
            "position": {"minX": x1, "minY": y1, "maxX": x2, "maxY": y2},
            "domain": "pixel",
            "class_id": color,
            "box_caption": f"{classes[label - 1] if label <= len(classes) else label} {value:.2f}",
            "scores": {"score": value},
        }
        for (x1, y1, x2, y2), label, value, color in rows
    ]
    return {"box_data": data, "class_labels": dict(names)}
