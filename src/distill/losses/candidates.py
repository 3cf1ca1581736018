"""Candidates for the prototypes of Global Knowledge: boxes of the training images, and their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.transform import resize_boxes

from distill import distributed
from distill.losses import masks
from distill.losses.base import derive_seed
from distill.losses.prototypes import box_means
from distill.precision import upcast
from distill.types import Pyramid, Size, View


class ImageCandidates(NamedTuple):
    """The candidates of one training image with k boxes."""

    image: int
    """Index of the image in the data set."""
    keep: Tensor
    """(k,) which boxes are candidates."""
    labels: Tensor
    """(n,) labels of the candidates."""


def select_candidates(images: Any, limit: int, min_side: float, seed: int) -> Iterator[ImageCandidates]:
    """Boxes of the training images, taken in an order that the seed and the image ids determine.

    Args:
        images: images of a split, with `ids` and `target(index)`.
        limit: number of images per class.
        min_side: boxes with a smaller side, in pixels of the stored image, are left out.
        seed: determines the order.
    """
    left: dict[int, int] = {}
    for index in sorted(range(len(images)), key=lambda index: derive_seed(seed, int(images.ids[index]))):
        target = images.target(index)
        large = ((target.boxes[:, 2:] - target.boxes[:, :2]) > min_side).all(1)
        wanted = {label for label in target.labels[large].unique().tolist() if left.setdefault(label, limit)}
        if wanted:
            keep = large & torch.tensor([label in wanted for label in target.labels.tolist()])
            for label in wanted:
                left[label] -= 1
            yield ImageCandidates(index, keep, target.labels[keep])


class CandidateFeatures:
    """Features of the candidates in both models, pooled on every level of the neck. The teacher's are computed once.

    Args:
        levels: strides of the neck.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self.levels = levels
        self.teacher_features: dict[int, Tensor] = {}
        """Index of an image -> (n, L, C), the teacher's features of its candidates."""

    @torch.no_grad()
    def compute(
        self, candidates: Sequence[ImageCandidates], data: Any, student: Any, teacher: Any, device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """Features (n, L, C) of the student and of the teacher for each image, on the host, because they are many.

        Each process computes its share of the images, and all processes get all features.
        """
        computed: dict[int, tuple[Tensor, Tensor]] = {}
        training = student.training
        student.eval()  # these images must not change the running statistics
        for places in _batches(candidates, data)[distributed.rank() :: distributed.world_size()]:
            indices = [candidates[place].image for place in places]
            batch = data.load_batch("train", indices).to(device)
            # The targets of the batch lack boxes that became too thin; the candidates include them.
            stored = [data.dataset("train", training=False).target(index).boxes for index in indices]
            boxes = [
                resize_boxes(image_boxes[candidates[place].keep].to(device), before, after)
                for image_boxes, place, before, after in zip(
                    stored, places, batch.original_sizes, batch.sizes, strict=True
                )
            ]
            student_features = self._pool(student.view(batch, training=False, frozen=True), boxes)
            if any(index not in self.teacher_features for index in indices):
                teacher_features = self._pool(teacher.view(batch, training=False), boxes)
                self.teacher_features |= dict(zip(indices, teacher_features, strict=True))
            for place, features, index in zip(places, student_features, indices, strict=True):
                computed[place] = features, self.teacher_features[index]
        student.train(training)
        gathered = {place: pair for share in distributed.gather_objects(computed) for place, pair in share.items()}
        return [gathered[place] for place in range(len(candidates))]

    def _pool(self, view: View, boxes: Sequence[Tensor]) -> list[Tensor]:
        """(n, L, C) for each image, on the host."""
        features = pool_all_levels(view, self.levels, boxes)
        # Clones, because a view would be sent to the other processes with the memory of its whole batch.
        return [part.clone() for part in torch.split(features.cpu(), [len(image_boxes) for image_boxes in boxes])]


def pool_all_levels(view: View, levels: Sequence[int], boxes: Sequence[Tensor]) -> Tensor:
    """(R, L, C): every box pooled on every level of the neck, in float32 or float64."""
    neck: Pyramid = {stride: view.neck[stride] for stride in levels}
    image = masks.map_size(view.batch.images)
    return torch.stack([box_means(upcast(x), boxes, image) for x in neck.values()], dim=1)


def _batches(candidates: Sequence[ImageCandidates], data: Any) -> list[list[int]]:
    """Indices of `candidates` by batch. A batch has one padded size, so that other images do not change features."""
    sizes = data.padded_sizes("train")
    groups: dict[Size, list[int]] = {}
    for place, candidate in enumerate(candidates):
        groups.setdefault(sizes[candidate.image], []).append(place)
    step = data.eval_batch_size
    return [group[start : start + step] for group in groups.values() for start in range(0, len(group), step)]
