"""A table for W&B: one row per validation image, with the boxes of student and teacher colored by agreement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.datamodule import DetectionData
from distill.evaluation.matching import match
from distill.evaluation.metric import BoolArray, DetectionArrays, GroundTruth
from distill.losses.masks import Mask, map_size
from distill.training.callbacks.prediction_images import box_layer, predict_columns, unpadded_images
from distill.training.distiller import Distiller
from distill.types import Batch, Detections, Target

BATCH = 8
"""Images that are computed at once."""
FOUND = {1: "found by both", 2: "teacher only", 3: "student only", 4: "missed by both"}
"""Color of a ground truth box -> which model finds the object."""
RIGHT = {1: "right", 2: "wrong"}
"""Color of a detection -> whether it matches an object of its class with an IoU of at least 0.5."""
COLUMNS = (
    *("id", "image", "objects", "student finds", "teacher finds"),
    *("teacher right, student wrong", "student right, teacher wrong"),
)


def prediction_table(module: Distiller, data: DetectionData, images: int, score: float) -> Any:
    """Build the table of the first validation images.

    An image has its ground truth, the detections of both models, and the mask of the first distillation loss that has
    one, as layers that can be switched. "Teacher right, student wrong" counts the objects that only the teacher finds.

    Args:
        module: with the weights to show.
        data: the data.
        images: number of rows, at most.
        score: least score of a detection that counts and is shown.
    """
    import wandb

    count = min(images, len(data.ground_truth("val")["images"]))
    rows: list[list[Any]] = []
    for start in range(0, count, BATCH):
        batch = data.load_batch("val", range(start, min(start + BATCH, count))).to(module.device)
        columns = predict_columns(module, batch)
        masks = distillation_masks(module, batch)
        for number, picture in enumerate(unpadded_images(batch)):
            target = batch.targets[number]
            shown: dict[str, Detections] = {
                name: confident(columns[name][number], score) for name in ("student", "teacher") if name in columns
            }
            found, right = compare(target, shown)
            layers = {"ground_truth": box_layer(target, _found_colors(found), FOUND, data.classes)}
            layers |= {
                name: box_layer(one, np.where(right[name], 1, 2).tolist(), RIGHT, data.classes)
                for name, one in shown.items()
            }
            overlay = None if masks is None else {"distillation": masks.layer(number, picture)}
            image = wandb.Image(picture.permute(1, 2, 0).numpy(), boxes=layers, masks=overlay)
            rows.append([batch.ids[number], image, len(target.labels), *_counts(found)])
    return wandb.Table(columns=list(COLUMNS), data=rows)


def confident(detections: Target | Detections, score: float) -> Detections:
    """The detections with at least a score, on the CPU."""
    assert isinstance(detections, Detections)
    kept = detections.scores >= score
    return Detections(detections.boxes[kept].cpu(), detections.scores[kept].cpu(), detections.labels[kept].cpu())


def compare(target: Target, models: Mapping[str, Detections]) -> tuple[dict[str, BoolArray], dict[str, BoolArray]]:
    """Match the detections of each model with the objects of an image, as COCO does at IoU 0.5.

    Returns:
        Model -> whether it finds each object, and model -> whether each of its detections is right.
    """
    corners, labels = target.boxes.cpu().double().numpy(), target.labels.cpu().numpy()
    size = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    none, zeros = np.zeros(len(labels), dtype=np.bool_), np.zeros(len(labels), dtype=np.int64)
    codes = np.full(len(labels), None, dtype=object)
    truth = GroundTruth(np.zeros(1, dtype=np.int64), zeros, labels, size, size[:, 2] * size[:, 3], none, none, codes)
    found, right = {}, {}
    for name, one in models.items():
        arrays = DetectionArrays(
            np.zeros(len(one.labels), dtype=np.int64),
            one.labels.numpy(),
            one.boxes.double().numpy(),
            one.scores.double().numpy(),
            np.full(len(one.labels), None, dtype=object),
        )
        matches = match(truth, arrays)
        found[name], right[name] = matches.detection >= 0, matches.correct
    return found, right


def _found_colors(found: Mapping[str, BoolArray]) -> list[int]:
    student = found["student"]
    teacher = found.get("teacher", np.zeros_like(student))
    colors: list[int] = np.select([student & teacher, teacher, student], [1, 2, 3], 4).tolist()
    return colors


def _counts(found: Mapping[str, BoolArray]) -> list[int | None]:
    student, teacher = found["student"], found.get("teacher")
    if teacher is None:
        return [int(student.sum()), None, None, None]
    return [int(part.sum()) for part in (student, teacher, teacher & ~student, student & ~teacher)]


class MaskLayers:
    """The masks of a loss on the finest map of the neck, for a batch."""

    def __init__(self, name: str, mask: Tensor) -> None:
        self.name = name
        self.mask = mask
        """(B, H, W) bool, in pixels of the padded images."""

    def layer(self, number: int, picture: Tensor) -> dict[str, Any]:
        """The mask of an image as a layer of W&B."""
        height, width = picture.shape[-2:]
        data = self.mask[number, :height, :width].to(torch.uint8).cpu().numpy()
        return {"mask_data": data, "class_labels": {0: "outside", 1: f"mask of {self.name}"}}


def distillation_masks(module: Distiller, batch: Batch) -> MaskLayers | None:
    """The masks of the first loss that has one; None if no loss has one, or its kind does not fit."""
    masks = {name: loss.mask for name, loss in module.losses.items() if isinstance(getattr(loss, "mask", None), Mask)}
    if not masks or "neck" not in module.student.spec.outputs:
        return None
    name, mask = next(iter(masks.items()))
    view = module.student.view(batch, training=False, frozen=True)
    finest = min(view.spec.neck)
    weights = mask(view, {finest: map_size(view.neck[finest])}, range(len(batch)))[finest]
    return MaskLayers(name, F.interpolate(weights[:, None].float(), batch.images.shape[-2:])[:, 0] > 0.5)
