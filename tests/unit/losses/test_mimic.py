"""Mimic: slow oracles of both senses, and whose regions of which kind are pooled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cli.config import compose, instantiate
from distill.losses.base import DistillLoss
from distill.losses.mimic import Mimic
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid

NONE = {"kernel": None}
NECK_ONLY: dict[str, Any] = {"regions": {"all": 0}, "neck": {"all": 1}}


def half_mean(student: Tensor, teacher: Tensor) -> float:
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    return sum((s - t) ** 2 for s, t in pairs) / (2 * len(pairs))


class TestMimic(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Mimic(student, teacher, neck={"all": 2}, adapter=NONE)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Mimic(student, teacher, neck={"all": 2})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        levels = [half_mean(x, teacher.neck[s]) for s, x in student.neck.items()]
        regions = zip(student.roi_features([]), teacher.roi_features([]), strict=True)
        values = [half_mean(s, t) for s, t in regions]
        return {"regions.all": sum(values) / max(1, len(values)), "neck.all": sum(levels) / 5}


class TestMimicOfPredictions(TestMimic):
    """For detectors without regions of their own."""

    student = spec(two_stage=False, strides=(8, 16, 32, 64, 128))
    teacher = spec(two_stage=False, strides=(8, 16, 32, 64, 128))

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Mimic(student, teacher, regions={"kind": "predictions"}, neck={"all": 2}, adapter=NONE)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Mimic(student, teacher, regions={"kind": "predictions"}, neck={"all": 2}, adapter={"kernel": 3})


class Watched(FakeView):
    def roi_features(self, boxes: Any) -> Tensor:
        self.stages.setdefault("asked", []).append(boxes)
        return super().roi_features(boxes)

    def predictions(self, score: float | None = None, nms: float | None = None, top: int | None = None) -> Any:
        self.stages["thresholds"] = score, nms, top
        return super().predictions(score, nms, top)


def watched(dtype: torch.dtype = torch.float64) -> tuple[Watched, Watched]:
    views = (random_view(batch(OBJECTS), spec(), seed, dtype=dtype) for seed in (1, 2))
    student, teacher = (Watched(view.batch, view.spec, **view.stages) for view in views)
    return student, teacher


@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["rois", "proposals", "predictions"])
def test_both_pool_the_same_regions_of_the_one_that_was_asked_for(source: str, kind: str) -> None:
    student, teacher = watched()
    Mimic(spec(), spec(), regions={"source": source, "kind": kind, "top": 2}, adapter=NONE)(student, teacher)
    owner, other = (student, teacher) if source == "student" else (teacher, student)
    student_boxes, teacher_boxes = (view.stages["asked"][0] for view in (student, teacher))
    assert all(a is b for a, b in zip(student_boxes, teacher_boxes, strict=True))
    whole = owner.stages["rois"].boxes if kind == "rois" else owner.stages["proposals"]
    if kind == "rois":
        assert student_boxes is whole  # equal tensors, or the View would pool them again
    elif kind == "proposals":
        assert all(torch.equal(box, all_of[:2]) for box, all_of in zip(student_boxes, whole, strict=True))
    else:
        assert owner.stages["thresholds"] == (0.0, None, 2)
    assert other.reads == {"roi_features"}
    assert owner.reads == {"roi_features", kind}


def test_boxes_are_no_way_for_the_gradient() -> None:
    student, teacher = watched()
    boxes = [detections.boxes.requires_grad_() for detections in student.stages["predictions"]]
    Mimic(spec(), spec(), regions={"kind": "predictions"}, adapter=NONE)(student, teacher)
    assert boxes
    assert not any(boxes.requires_grad for boxes in student.stages["asked"][0])


def test_a_term_without_weight_is_neither_built_nor_computed() -> None:
    student, teacher = watched(torch.float32)
    regions, neck = Mimic(spec(), spec()), Mimic(spec(), spec(), **NECK_ONLY)
    assert list(regions(student, teacher)) == ["regions.all"]
    assert teacher.reads == {"roi_features"}
    assert [tuple(parameter.shape) for parameter in regions.parameters()] == [(6, 6, 1, 1), (6,)]
    student, teacher = watched(torch.float32)
    assert list(neck(student, teacher)) == ["neck.all"]
    assert student.reads == teacher.reads == {"neck"}
    assert len(list(neck.parameters())) == 2 * 5
    nothing = Mimic(spec(), spec(), regions={"all": 0})
    assert nothing(student, teacher) == {}


def test_regions_count_over_images_and_not_image_by_image() -> None:
    """Three regions of one image and one of another: a mean over four."""
    student, teacher = watched()
    for view, fill in ((student, 0.0), (teacher, 1.0)):
        view.stages["roi_features"] = torch.full((4, 6, 7, 7), fill, dtype=torch.float64)
    teacher.stages["roi_features"][3] = 5.0
    value = Mimic(spec(), spec(), adapter=NONE)(student, teacher)["regions.all"]
    assert value.item() == pytest.approx((3 * 0.5 + 25 / 2) / 4)


@pytest.mark.parametrize(("normalization", "factor"), [("half_mse", 0.5), ("mse", 1.0), ("half_l2", 3.0)])
def test_normalization_of_the_neck(normalization: str, factor: float) -> None:
    student, teacher = watched()
    loss = Mimic(
        spec(),
        spec(),
        regions={"all": 0},
        neck={"all": 1, "levels": [8], "normalization": normalization},
        adapter=NONE,
    )
    expected = factor * (student.neck[8] - teacher.neck[8]).square().mean().item()
    assert loss(student, teacher)["neck.all"].item() == pytest.approx(expected)


def test_falls_when_it_alone_is_minimised() -> None:
    student, teacher = watched(torch.float32)
    loss = Mimic(spec(), spec(), neck={"all": 1})
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    values = []
    for _ in range(30):
        terms = loss(student, teacher)
        optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        values.append({name: value.item() for name, value in terms.items()})
    assert all(values[-1][name] < 0.95 * values[0][name] for name in values[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": {"source": "both"}}, "source='both'"),
        ({"regions": {"kind": "anchors"}}, "a kind of rois, proposals, predictions, got"),
        ({"regions": {"top": 0}}, "regions.top: expected a number of regions an image, 1 or more, got 0"),
        ({"regions": {"positive": 1}}, "regions: unknown option 'positive'"),
        ({"regions": {"all": -1}}, "Mimic: expected weights"),
        ({"neck": {"all": 1, "levels": [2]}}, "neck.levels"),
        ({"neck": {"all": 1, "normalization": "sum"}}, "neck: expected a normalization"),
        ({"adapter": {"kernel": 7}}, "adapter"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        Mimic(spec(), spec(), **options)


def test_detectors_that_do_not_match_are_refused() -> None:
    one_stage = spec(two_stage=False)
    with pytest.raises(
        DistillError,
        match=r"regions.kind=\w+: the student is a retinanet, which has no rois\. Set regions.kind=predictions",
    ):
        Mimic(one_stage, spec())
    with pytest.raises(
        DistillError, match=r"the teacher is a retinanet, which has no rois\. Set regions.kind=predictions"
    ):
        Mimic(spec(), one_stage, regions={"source": "teacher"})
    Mimic(spec(), one_stage)
    Mimic(one_stage, spec(), regions={"source": "teacher"})
    Mimic(one_stage, one_stage, **NECK_ONLY)
    with pytest.raises(DistillError, match="equally many channels on all levels of the teacher's neck"):
        Mimic(spec(), replace(spec(), neck={4: 6, 8: 7}))
    with pytest.raises(DistillError, match="the student has 6 channels and the teacher 8"):
        Mimic(spec(), spec(neck=8), adapter=NONE)


def test_options_say_which_mimic_is_meant_and_add_up_with_defeat() -> None:
    losses = compose.compose_config(["distill=[defeat,mimic]"]).distill.losses
    built = {str(name): instantiate.build_node(node, student=spec(), teacher=spec()) for name, node in losses.items()}
    assert built["mimic"].weights == {"regions.all": 1}
    student, teacher = watched(torch.float32)
    assert [list(loss(student, teacher)) for loss in built.values()] == [
        ["neck.foreground", "neck.background"],
        ["regions.all"],
    ]
    node = compose.compose_config(["distill=mimic_neck"]).distill.losses.mimic
    assert instantiate.build_node(node, student=spec(), teacher=spec()).weights == {"neck.all": 3}
