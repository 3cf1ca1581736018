"""LD: its terms and the valuable region by loops, and refusals that name the head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.detectors.retinanet import DistributionView
from distill.losses.base import DistillLoss
from distill.losses.bckd import BCKD
from distill.losses.ld import LD, AnchorGrid, valuable
from distill.types import Batch, DetectorSpec, DistillError
from helpers.detectors import padded_batch, random_detector
from helpers.fake_view import PYRAMIDS, FakeView, batch, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.two_processes import assert_two_equal_one

BINS = 5
DENSE = spec(two_stage=False, strides=(8, 16, 32), anchors=2)
SPEC = replace(DENSE, outputs=DistributionView.outputs, side_bins=BINS)
HEADS = {"box_head": "distribution", "box_loss": "giou"}


def slow_kl(student: list[float], teacher: list[float], tau: float) -> float:
    """tau^2 mean q (log q - log p)."""

    def softmax(logits: list[float]) -> list[float]:
        exps = [math.exp(x / tau - max(logits) / tau) for x in logits]
        return [e / sum(exps) for e in exps]

    p, q = softmax(student), softmax(teacher)
    return tau**2 * sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True)) / len(p)


def slow_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0.0, width) * max(0.0, height)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def center(box: list[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def slow_diou(a: list[float], b: list[float]) -> float:
    hull = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    diagonal = (hull[2] - hull[0]) ** 2 + (hull[3] - hull[1]) ** 2
    return slow_iou(a, b) - math.dist(center(a), center(b)) ** 2 / diagonal


def slow_valuable(truth: list[list[float]], levels: list[list[list[float]]]) -> list[float]:
    anchors = [anchor for level in levels for anchor in level]
    found = [0.0] * len(anchors)
    for box in truth:
        candidates = []
        for level in levels:
            nearest = sorted(level, key=lambda anchor: math.dist(center(anchor), center(box)))[:9]
            candidates += [slow_iou(box, anchor) for anchor in nearest]
        mean = sum(candidates) / len(candidates)
        limit = mean + math.sqrt(sum((x - mean) ** 2 for x in candidates) / (len(candidates) - 1))
        for index, anchor in enumerate(anchors):
            if limit / 4 <= slow_diou(box, anchor) < limit:
                found[index] = max(found[index], slow_iou(box, anchor))
    return found


def is_inside(point: tuple[float, float], box: list[float]) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def test_the_valuable_region_is_that_of_the_loop() -> None:
    """Anchors at random places, so that no two are equally near."""
    torch.manual_seed(0)
    levels = []
    for count, side in ((40, 20.0), (12, 40.0), (5, 80.0)):
        corner = torch.rand(count, 2) * 80
        levels.append(torch.cat([corner, corner + side * (0.7 + 0.6 * torch.rand(count, 2))], 1))
    truth = torch.tensor([[10.0, 12.0, 44.0, 40.0], [50.0, 30.0, 90.0, 99.0]])
    found = valuable(truth, AnchorGrid(torch.cat(levels), [len(level) for level in levels]))
    expected = slow_valuable(truth.tolist(), [level.tolist() for level in levels])
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert 0 < len([weight for weight in expected if weight]) < len(expected)


class TestLD(LossGrid):
    student = SPEC
    teacher = SPEC
    twice = 2.0  # sums without a divisor
    relative = 1e-6
    divisor = "none"
    options: Mapping[str, Any] = {}

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return LD(student, teacher, logits={"classes": 0.0}, divisor=self.divisor, **self.options)

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        views = super().pair(images, **options)
        for seed, view in enumerate(views):
            generators = [torch.Generator().manual_seed(100 * seed + image) for image in images.ids]
            dtype = view.neck[8].dtype
            view.stages["side_logits"] = {
                at: torch.stack([torch.randn(2 * 4 * BINS, *x.shape[2:], generator=g, dtype=dtype) for g in generators])
                for at, x in view.deltas.items()
            }
            generator = torch.Generator().manual_seed(5)
            for at, boxes in view.anchors.items():  # no two anchors of a level are equally near to a box
                view.stages["anchors"][at] = boxes + torch.rand(boxes.shape, generator=generator)
        return views

    def sides(self, view: FakeView) -> list[Tensor]:
        """Of each image, (N, 4, bins) in the order of the anchors."""
        levels = [
            x.view(len(x), 2, 4, BINS, *x.shape[2:]).permute(0, 4, 5, 1, 2, 3).flatten(1, 3)
            for x in view.side_logits.values()
        ]
        return list(torch.cat(levels, 1))

    def scores(self, view: FakeView) -> list[Tensor]:
        """Of each image, (N, K)."""
        levels = [
            x.view(len(x), 2, 4, *x.shape[2:]).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in view.class_logits.values()
        ]
        return list(torch.cat(levels, 1))

    def near(self, truth: list[list[float]], levels: list[list[list[float]]]) -> list[float] | None:
        """The weights of the valuable anchors; None: the scores of those inside a box."""
        return slow_valuable(truth, levels)

    @staticmethod
    def inside(view: FakeView, image: int, anchor: int) -> bool:
        point = center(torch.cat(list(view.stages["anchors"].values()))[anchor].tolist())
        return any(is_inside(point, box) for box in view.batch.targets[image].boxes.tolist())

    def error(self, own: list[list[float]], other: list[list[float]]) -> float:
        return sum(slow_kl(s, t, 10.0) for s, t in zip(own, other, strict=True))

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        labels, sums = student.stages["anchor_targets"].labels, {"sides.main": 0.0, "sides.valuable": 0.0}
        levels = [boxes.tolist() for boxes in student.stages["anchors"].values()]
        pairs = zip(self.sides(student), self.sides(teacher), strict=True)
        for image, (own, other) in enumerate(pairs):
            weights = self.near(student.batch.targets[image].boxes.tolist(), levels)
            scores = [1 / (1 + math.exp(-max(logits))) for logits in self.scores(student)[image].tolist()]
            for anchor in range(len(own)):
                error, positive = self.error(own[anchor].tolist(), other[anchor].tolist()), labels[image, anchor] > 0
                weight = (
                    weights[anchor] if weights is not None else self.inside(student, image, anchor) * scores[anchor]
                )
                if positive:
                    sums["sides.main"] += error / 4 * scores[anchor]
                if self.options.get("region_positives") or not positive:
                    sums["sides.valuable"] += error / 16 * weight
        count = max(1, int((labels > 0).sum())) if self.divisor == "positives" else 1
        return {name: value / count for name, value in sums.items()}


class TestDividedLD(TestLD):
    divisor = "positives"
    twice = 1.0


class TestLDWithPositives(TestLD):
    options: Mapping[str, Any] = {"region_positives": True}


class TestLDInside(TestLD):
    options: Mapping[str, Any] = {"region": "inside"}

    def near(self, truth: list[list[float]], levels: list[list[list[float]]]) -> list[float] | None:
        return None


class TestLDOfAnchors(TestLD):
    """One softmax over the bins of all sides."""

    options: Mapping[str, Any] = {"softmax_over": "anchor"}

    def error(self, own: list[list[float]], other: list[list[float]]) -> float:
        return slow_kl(*([logit for side in sides for logit in side] for sides in (own, other)), 10.0)


class TestClasses(TestLD):
    twice = 1.0

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return LD(student, teacher, sides={"main": 0.0, "valuable": 0.0})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        """The sum over levels of the mean over the positive anchors of the level."""
        labels, total, start = student.stages["anchor_targets"].labels, 0.0, 0
        pairs = list(zip(self.scores(student), self.scores(teacher), strict=True))
        for boxes in student.stages["anchors"].values():
            rows = [(image, anchor) for image, anchor in (labels > 0).nonzero().tolist() if start <= anchor]
            rows = [(image, anchor) for image, anchor in rows if anchor < start + len(boxes)]
            values = [slow_kl(*(x[anchor].tolist() for x in pairs[image]), 8.0) for image, anchor in rows]
            total += sum(values) / max(1, len(values))
            start += len(boxes)
        return {"logits.classes": total}


def make(normalizer: str) -> DistillLoss:
    return LD(SPEC, SPEC, normalizer=normalizer)


def scene() -> tuple[FakeView, FakeView]:
    return TestLD().pair(batch([OBJECTS[0], OBJECTS[1], NOTHING, OBJECTS[1]]))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Sums without a divisor, too: they are those of the whole batch."""
    assert_two_equal_one(make, scene, tmp_path, relative=1e-6)


def test_real_heads_teach_each_other() -> None:
    """All terms have a gradient at the student's distributions; the weights of the scores have none."""
    student, teacher = (random_detector("retinanet", seed=seed, **HEADS) for seed in (0, 1))
    for detector in (student, teacher):
        torch.nn.init.normal_(detector.net.head.regression_head.bbox_reg.weight)
    teacher.eval().requires_grad_(False)
    data = padded_batch()
    values = LD(student.spec, teacher.spec)(student.view(data), teacher.view(data, frozen=True))
    assert all(value.isfinite() and value > 0 for value in values.values())
    (values["sides.main"] + values["sides.valuable"]).backward()
    head = student.net.head
    assert head.regression_head.bbox_reg.weight.grad.any()
    assert head.classification_head.cls_logits.weight.grad is None


def test_refusals() -> None:
    with pytest.raises(DistillError, match=r"which has no side_logits\. Set the weights of sides to 0, or give .*"):
        LD(DENSE, DENSE)
    with pytest.raises(DistillError, match="got box_bins=5 of the student and 9 of the teacher"):
        LD(SPEC, replace(SPEC, side_bins=9))
    with pytest.raises(DistillError, match="class_temperature: expected a number above 0"):
        LD(SPEC, SPEC, class_temperature=0)
    with pytest.raises(DistillError, match="expected divisor to be none or positives"):
        LD(SPEC, SPEC, divisor="all")
    with pytest.raises(
        DistillError, match=r"expected region of diou or inside .* got region=near and softmax_over=side"
    ):
        LD(SPEC, SPEC, region="near")
    assert LD(DENSE, DENSE, sides={"main": 0, "valuable": 0}).weights == {"logits.classes": 10.0}


def test_a_teacher_of_the_other_box_head_is_named() -> None:
    student, teacher = random_detector("retinanet", **HEADS), random_detector("retinanet")
    with pytest.raises(DistillError, match="box_head is distribution for the student and regression for the teacher"):
        BCKD(student.spec, teacher.spec)


def test_all_terms_read_ground_truth() -> None:
    loss = LD(SPEC, SPEC)
    assert loss.truth_terms == list(loss.weights) == ["sides.main", "sides.valuable", "logits.classes"]


def test_fake_views_have_the_stage() -> None:
    assert "side_logits" in PYRAMIDS
