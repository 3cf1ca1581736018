"""SSIM between real detectors of the same family and of two."""

from __future__ import annotations

import itertools

import pytest

from distill.losses.ssim import SSIM
from helpers.detectors import FAMILIES, padded_batch, random_detector


@pytest.mark.parametrize(("ours", "theirs"), itertools.product(FAMILIES, FAMILIES))
def test_teaches_every_pair_of_families(ours: str, theirs: str) -> None:
    student, teacher = random_detector(ours, seed=1), random_detector(theirs, seed=2, neck_channels=96)
    loss = SSIM(student.spec, teacher.spec)
    data = padded_batch()
    view = student.view(data, training=True, seed=3)
    value = loss(view, teacher.view(data, frozen=True))["neck.foreground"]
    shared = len(set(student.spec.neck) & set(teacher.spec.neck))
    assert 0.01 * shared < value.item() < shared  # each level adds up to 1
    value.backward()
    body = [parameter for name, parameter in student.net.named_parameters() if name.startswith("backbone.fpn")]
    assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in body)
    assert all(each.grad is not None and each.grad.isfinite().all() for each in loss.parameters())
    assert all(each.grad is None for each in teacher.parameters())
