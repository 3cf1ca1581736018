"""Pictures of the images with errors of the student that the teacher does not make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image

from distill.data.datamodule import DetectionData
from distill.evaluation.metric import DetectionArrays
from distill.evaluation.pictures import panel
from distill.types import Detections, Size, Target


def draw_image(data: DetectionData, split: str, index: int, models: Mapping[str, DetectionArrays]) -> Image.Image:
    """Draw the ground truth and the detections of each model side by side.

    Args:
        data: the data set.
        split: `train`, `val` or `test`.
        index: index of the image in ``data.ground_truth(split)["images"]``.
        models: name of a model -> the detections to draw, of all images.
    """
    batch = data.load_batch(split, [index])
    size, image_id = batch.sizes[0], batch.ids[0]
    columns: dict[str, Detections | Target] = {"ground truth": replace(batch.targets[0], masks=None)}
    for name, found in models.items():
        columns[name] = detections_of(found, image_id, batch.original_sizes[0], size)
    return panel(batch.images[0, :, : size[0], : size[1]], columns, data.classes, min_score=0.0)


def detections_of(found: DetectionArrays, image_id: int, original: Size, resized: Size) -> Detections:
    """The detections of one image, in pixels of the resized image. Sizes are (height, width)."""
    rows = found.image == image_id
    scale = torch.tensor([resized[1] / original[1], resized[0] / original[0]] * 2)
    boxes, scores, labels = (torch.from_numpy(column[rows]) for column in (found.box, found.score, found.label))
    order = scores.argsort(descending=True, stable=True)
    return Detections((boxes * scale).float()[order], scores.float()[order], labels[order])


def image_indices(data: DetectionData, split: str, ids: Sequence[int]) -> list[int]:
    """Indices of images in ``data.ground_truth(split)["images"]`` by their ids."""
    index = {image["id"]: number for number, image in enumerate(data.ground_truth(split)["images"])}
    return [index[image_id] for image_id in ids]
