"""What some losses need besides two Views: prototypes, variances that are not 0, a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.frozen import FrozenModel
from distill.losses.base import DistillLoss
from distill.losses.fbkd import FBKD
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.pad import Variance
from distill.losses.standardization import BatchNorm
from distill.types import Batch, DetectorSpec, View
from helpers.fake_view import FakeView

ALL_TERMS: dict[str, Mapping[str, Any]] = {"relation": {"weight": 5.0}, "prototypes": {"count": 3}}
CLASSIFIER_CLASSES = ("hen", "owl", "cat", "dog", "cow")
"""The classifier's classes: more than the student's, in another order."""
CROP_SIDE = 12
"""Side of the classifier's crops in pixels."""


class SeveralLosses(DistillLoss):
    """Terms of several losses, as ``name/term``."""

    def __init__(self, **losses: DistillLoss) -> None:
        super().__init__({})
        self.losses = torch.nn.ModuleDict(losses)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        values = {name: loss(student, teacher) for name, loss in self.losses.items()}
        return {f"{name}/{term}": value for name, terms in values.items() for term, value in terms.items()}


def with_prototypes(loss: GlobalKnowledge, student: DetectorSpec, teacher: DetectorSpec) -> GlobalKnowledge:
    """Prototypes of the classes 1 to 3; the fourth class has no instance."""
    generator = torch.Generator().manual_seed(5)
    for buffer in (loss.student_prototypes, loss.teacher_prototypes):
        buffer.normal_(generator=generator)
        buffer[3] = 0
    return loss


def with_related_cells(loss: FBKD) -> FBKD:
    """With non-local blocks that are not the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in loss.modules():
            if isinstance(part, BatchNorm):
                part.weight.normal_(generator=generator)
    return loss


def with_two_classes(view: FakeView) -> FakeView:
    """The view with its positives, each third region, of the classes 3 and 4 in turn."""
    labels = [image_labels * (3 + torch.arange(len(image_labels)) % 2) for image_labels in view.rois.labels]
    view.stages["rois"] = view.rois._replace(labels=labels)
    return view


def variance_modules(loss: nn.Module) -> dict[str, Variance]:
    return {name: part for name, part in loss.named_modules() if isinstance(part, Variance)}


def randomize_variances(loss: DistillLoss) -> DistillLoss:
    """With variances that are not 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in variance_modules(loss).values():
            for parameter in part.parameters():
                parameter.normal_(0, 0.3, generator=generator)
    return loss


class RandomClassifier(FrozenModel):
    """A classifier with random weights, that counts the crops it has classified."""

    def __init__(self, classes: tuple[str, ...] = CLASSIFIER_CLASSES) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.ModuleDict({"stem": nn.Conv2d(3, 5, 3, padding=1), "fc": nn.Linear(12, len(classes))})
        super().__init__(net, "memory")
        self.net, self.classes, self.classified = net, classes, 0

    def images(self, batch: Batch) -> Tensor:
        return (batch.images.float() / 255 - 0.4) / 0.2

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        self.classified += len(images)
        logits: Tensor = 4 * self.net["fc"](
            images.reshape(len(images), 3, 2, CROP_SIDE // 2, 2, CROP_SIDE // 2).mean((3, 5)).flatten(1)
        )
        return logits

    def stem(self, images: Tensor) -> Tensor:
        features: Tensor = self.net["stem"](images).relu()
        return features
