"""Mimic, FGFI and PAD with real detectors of each family: the gradient of a step reaches only student and loss.

Losses that can teach across families and backbones do so for some steps, down to the student's body.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from distill.losses.defeat import DeFeat
from distill.losses.fgfi import FGFI
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD
from distill.losses.tadf import TADF
from helpers.detectors import padded_batch, random_detector

PREDICTIONS = {"kind": "predictions", "top": 20}
BOTH = {"neck": {"all": 1}}
METHODS: dict[str, Any] = {
    "mimic": partial(Mimic, **BOTH),
    "mimic of proposals": partial(Mimic, regions={"kind": "proposals", "top": 20}),
    "mimic of predictions": partial(Mimic, regions=PREDICTIONS, **BOTH),
    "fgfi": FGFI,
    "fgfi on all levels": partial(FGFI, mask={"kind": "fine_grained_all_levels"}, normalization="half_l2"),
    "pad of mimic": partial(PAD, of=partial(Mimic, regions=PREDICTIONS, **BOTH)),
    "pad of fgfi": partial(PAD, of=FGFI),
}
FAMILIES = [*itertools.product(("faster_rcnn", "retinanet"), repeat=2), ("mask_rcnn", "mask_rcnn")]
PAIRS = [
    (student, teacher, method)
    for student, teacher in FAMILIES
    for method in METHODS
    if student != "retinanet" or method not in ("mimic", "mimic of proposals")
]


@pytest.mark.parametrize(("student", "teacher", "method"), PAIRS, ids=lambda value: value)
def test_a_step_reaches_the_student_and_the_loss_but_not_the_teacher(student: str, teacher: str, method: str) -> None:
    ours, theirs = random_detector(student), random_detector(teacher, seed=1, neck_channels=48).eval()
    loss, data = METHODS[method](student=ours.spec, teacher=theirs.spec), padded_batch()
    values = loss(ours.view(data), theirs.view(data, frozen=True, seed=0))
    assert values.keys() == loss.weights.keys()
    assert all(value.isfinite() and value > 0 for value in values.values())
    sum(values.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())
    neck = [parameter.grad for name, parameter in ours.named_parameters() if "fpn" in name]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in neck)
    assert all(parameter.grad is None for parameter in theirs.parameters())


ALIKE: dict[str, Any] = {
    "mimic": partial(Mimic, regions={"all": 0}, **BOTH),
    "fgfi": FGFI,
    "defeat": DeFeat,
    "pad": partial(PAD, of=FGFI),
    "tadf": partial(TADF, head={"classification": 0, "regression": 0}),
}
"""Methods that need shared strides only."""
UNLIKE: dict[str, Any] = {
    "retinanet by fcos": (("retinanet", {}), "fcos"),
    "retinanet by faster_rcnn": (("retinanet", {}), "faster_rcnn"),
    "mobilenet by resnet": (("faster_rcnn", {"backbone": "mobilenet_v2", "depth": None}), "faster_rcnn"),
}


@pytest.mark.parametrize("method", ALIKE)
@pytest.mark.parametrize("pair", UNLIKE)
def test_a_teacher_of_another_kind_teaches_down_to_the_body(pair: str, method: str) -> None:
    (family, options), teacher = UNLIKE[pair]
    ours, theirs = random_detector(family, **options), random_detector(teacher, seed=1, neck_channels=64).eval()
    loss, data = ALIKE[method](student=ours.spec, teacher=theirs.spec), padded_batch()
    optimizer = torch.optim.SGD([*ours.parameters(), *loss.parameters()], lr=1e-3)
    for step in range(2):
        values = loss(ours.view(data, seed=step), theirs.view(data, frozen=True, seed=0))
        assert values.keys() == loss.weights.keys()
        assert all(value.isfinite() for value in values.values())
        optimizer.zero_grad()
        sum(values.values()).backward()
        body = [each.grad for name, each in ours.named_parameters() if "backbone.body" in name]
        assert all(each is None or each.isfinite().all() for each in body)
        assert any(each is not None and each.abs().sum() > 0 for each in body)
        optimizer.step()
    assert all(parameter.grad is None for parameter in theirs.parameters())


def test_the_student_pools_its_regions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = random_detector("faster_rcnn"), random_detector("faster_rcnn", seed=1).eval()
    pool, calls = ours.net.roi_heads.box_roi_pool, []
    forward = pool.forward
    monkeypatch.setattr(pool, "forward", lambda *args: calls.append(1) or forward(*args))
    data = padded_batch()
    view = ours.view(data)
    _ = view.losses
    loss = Mimic(ours.spec, theirs.spec)
    torch.stack(list(loss(view, theirs.view(data, frozen=True, seed=0)).values())).sum().backward()
    assert calls == [1]
