"""A hand-made batch with a ground-truth box without area: no loss gives NaN, and Chen's box terms leave the box out."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.losses.chen import Chen
from distill.types import Batch, View
from helpers.detectors import padded_batch, random_detector
from helpers.methods import METHODS, QUERY_METHODS, small_loss


def batch_with_thin_boxes() -> Batch:
    """The first box of an image has no width, the second one no height."""
    batch = padded_batch()
    targets = []
    for target in batch.targets:
        boxes = target.boxes.clone()
        if len(boxes):
            boxes[0, 2], boxes[1, 3] = boxes[0, 0], boxes[1, 1]
        targets.append(replace(target, boxes=boxes))
    return replace(batch, targets=tuple(targets))


@functools.cache
def detectors(name: str = "defeat") -> tuple[Any, Any]:
    """The student and teacher of a method."""
    family, options = METHODS[name].family, METHODS[name].detectors
    return random_detector(family, **options), random_detector(family, seed=1, **options).eval()


def views(student: Any, teacher: Any) -> tuple[View, View]:
    batch = batch_with_thin_boxes()
    return student.view(batch, seed=0), teacher.view(batch, frozen=True, seed=0)


WITHOUT_MODELS = {name for name, method in METHODS.items() if not method.needs_model} - QUERY_METHODS


@pytest.mark.parametrize("name", sorted(WITHOUT_MODELS - {"maskd"}))
def test_every_loss_and_its_gradient_are_numbers(name: str) -> None:
    """A method with a model of its own is no pair of detectors; MasKD has the detector's losses, not finite here."""
    student, teacher = detectors(name)
    loss = small_loss(name)(student=student.spec, teacher=teacher.spec)
    values = loss(*views(student, teacher))
    assert {term for term, value in values.items() if not value.isfinite()} == set()
    parameters = list(student.parameters())
    total = torch.stack(list(values.values())).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_chens_box_terms_are_sums_over_the_other_boxes() -> None:
    student, teacher = views(*detectors())
    loss = Chen(student.spec, teacher.spec, margin=1e9)  # every error counts: |S - y|^2 without a bound
    values = loss(student, teacher)
    regions = student.rois
    deltas, expected, thin = student.roi_logits(regions.boxes)[1], 0.0, 0
    for row, (label, box, y) in enumerate(
        zip(torch.cat(regions.labels), torch.cat(regions.truth), torch.cat(regions.deltas), strict=True)
    ):
        if label > 0 and (box[2:] > box[:2]).all():
            expected += (deltas[row, 4 * label : 4 * label + 4] - y).square().sum().item()
        thin += int(label > 0 and not (box[2:] > box[:2]).all())
    assert thin > 0
    assert values["rcn.box"].item() == pytest.approx(expected / len(deltas), rel=1e-5)
