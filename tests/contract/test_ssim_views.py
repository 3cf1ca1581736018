"""SSIM between real detectors of the same family and of two."""

from __future__ import annotations

import itertools

import pytest

from distill.losses.ssim import SSIM
from helpers.detectors import FAMILIES, padded_batch, random_detector


@pytest.mark.parametrize(("student_family", "teacher_family"), itertools.product(FAMILIES, FAMILIES))
def test_teaches_every_pair_of_families(student_family: str, teacher_family: str) -> None:
    student, teacher = (
        random_detector(student_family, seed=1),
        random_detector(teacher_family, seed=2, neck_channels=96),
    )
    loss = SSIM(student.spec, teacher.spec)
    data = padded_batch()
    view = student.view(data, training=True, seed=3)
    value = loss(view, teacher.view(data, frozen=True))["neck.foreground"]
    shared = len(set(student.spec.neck) & set(teacher.spec.neck))
    assert 0.01 * shared < value.item() < shared  # each level adds up to 1
    value.backward()
    body = [parameter for name, parameter in student.net.named_parameters() if name.startswith("backbone.fpn")]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in body)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
