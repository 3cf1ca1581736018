"""SSIM between real detectors of the same family and of two."""

from __future__ import annotations

import itertools

import pytest

from contract.test_views import TAUGHT, batch, build
from distill.losses.ssim import SSIM


@pytest.mark.parametrize(("ours", "theirs"), itertools.product(TAUGHT, TAUGHT))
def test_teaches_every_pair_of_families(ours: str, theirs: str) -> None:
    student, teacher = build(ours, seed=1), build(theirs, seed=2, neck_channels=96)
    loss = SSIM(student.spec, teacher.spec)
    data = batch()
    view = student.view(data, training=True, seed=3)
    value = loss(view, teacher.view(data, frozen=True))["neck.foreground"]
    shared = len(set(student.spec.neck) & set(teacher.spec.neck))
    assert 0.01 * shared < value.item() < shared  # each level adds up to 1
    value.backward()
    body = [parameter for name, parameter in student.net.named_parameters() if name.startswith("backbone.fpn")]
    assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in body)
    assert all(each.grad is not None and each.grad.isfinite().all() for each in loss.parameters())
    assert all(each.grad is None for each in teacher.parameters())
