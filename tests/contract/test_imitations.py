"""Mimic, FGFI and PAD through real detectors of each family: one step's gradient reaches student and loss, and only them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_views import batch, build

from distill.losses.fgfi import FGFI
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD

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
PAIRS = [
    (student, teacher, method)
    for student in ("faster_rcnn", "retinanet")
    for teacher in ("faster_rcnn", "retinanet")
    for method in METHODS
    if student == "faster_rcnn" or method not in ("mimic", "mimic of proposals")
]


@pytest.mark.parametrize(("student", "teacher", "method"), PAIRS, ids=lambda value: value)
def test_a_step_reaches_the_student_and_the_loss_but_not_the_teacher(student: str, teacher: str, method: str) -> None:
    ours, theirs = build(student), build(teacher, seed=1, neck_channels=48).eval()
    loss, data = METHODS[method](student=ours.facts, teacher=theirs.facts), batch()
    values = loss(ours.view(data), theirs.view(data, frozen=True, seed=0))
    assert values.keys() == loss.weights.keys()
    assert all(value.isfinite() and value > 0 for value in values.values())
    sum(values.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())
    neck = [parameter.grad for name, parameter in ours.named_parameters() if "fpn" in name]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in neck)
    assert all(parameter.grad is None for parameter in theirs.parameters())


def test_the_student_pools_its_regions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = build("faster_rcnn"), build("faster_rcnn", seed=1).eval()
    pool, calls = ours.net.roi_heads.box_roi_pool, []
    forward = pool.forward
    monkeypatch.setattr(pool, "forward", lambda *args: calls.append(1) or forward(*args))
    data = batch()
    view = ours.view(data)
    _ = view.losses
    loss = Mimic(ours.facts, theirs.facts)
    torch.stack(list(loss(view, theirs.view(data, frozen=True, seed=0)).values())).sum().backward()
    assert calls == [1]
