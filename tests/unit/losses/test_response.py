"""Losses on class scores of anchors and regions: response, ADL and BCKD, by loops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torchvision.ops import generalized_box_iou

from distill.losses import heads
from distill.losses.adl import ADL, adaptive_divergence, entropy
from distill.losses.base import DistillLoss
from distill.losses.bckd import BCKD
from distill.losses.response import Response
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid
from helpers.slow_oracles import iou


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bernoulli(p: float, q: float) -> float:
    """KL(q || p)."""
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def slow_rows(view: FakeView, stage: str, width: int) -> list[list[list[float]]]:
    """The outputs of each image's anchors in order: level, row, column, anchor."""
    images: list[list[list[float]]] = []
    for image in range(len(view.batch)):
        rows = []
        for x in view.stages[stage].values():
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    values = x[image, :, row, column].tolist()
                    rows += [values[start : start + width] for start in range(0, len(values), width)]
        images.append(rows)
    return images


class Dense(LossGrid):
    student = spec(two_stage=False, strides=(8, 16, 32), anchors=2)
    teacher = spec(two_stage=False, strides=(8, 16, 32), anchors=2)

    def anchors(self, student: FakeView, teacher: FakeView) -> Any:
        """(label, student's logits, teacher's logits) of every anchor."""
        pairs = slow_rows(student, "class_logits", 4), slow_rows(teacher, "class_logits", 4)
        for labels, own, other in zip(student.stages["anchor_targets"].labels.tolist(), *pairs, strict=True):
            yield from zip(labels, own, other, strict=True)

    def test_zero_boxes_divide_by_one(self) -> None:
        student, _ = self.views([[]])
        assert not (student.stages["anchor_targets"].labels > 0).any()


class TestDenseResponse(Dense):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Response(student, teacher, temperature=2.0)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        total, positives = 0.0, 0
        for label, own, other in self.anchors(student, teacher):
            positives += label > 0
            if label >= 0:
                total += sum(bernoulli(sigmoid(a / 2), sigmoid(b / 2)) for a, b in zip(own, other, strict=True))
        return {"logits.classes": 4 * total / max(1, positives)}


class TestResponse(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Response(student, teacher, temperature=3.0)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        total = 0.0
        rows = [view.stages["roi_logits"][0].tolist() for view in (student, teacher)]
        for own, other in zip(*rows, strict=True):
            p, q = ([math.exp(v / 3) / sum(math.exp(w / 3) for w in row) for v in row] for row in (own, other))
            total += 9 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        return {"logits.classes": total / len(rows[0])}


class TestADL(Dense):
    options: Mapping[str, Any] = {}

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return ADL(student, teacher, **self.options)

    def count(self, scores: list[float], positives: int) -> float:
        return sum(q**1.8 for q in scores)

    def oracle(self, loss: ADL, student: FakeView, teacher: FakeView) -> dict[str, float]:
        total, positives, scores = 0.0, 0, []
        for label, own, other in self.anchors(student, teacher):
            positives += label > 0
            for a, b in zip(own, other, strict=True):
                p, q = sigmoid(a), sigmoid(b)
                scores.append(q)
                if label < 0 and not loss.ignored:
                    continue
                divergence, doubt = bernoulli(p, q), -q * math.log(q) - (1 - q) * math.log(1 - q)
                compared = divergence if loss.error == "divergence" else divergence + doubt
                total += (1 - math.exp(-(divergence + loss.beta * doubt))) ** loss.gamma * compared
        return {"logits.classes": total / max(1.0, self.count(scores, positives))}


class TestADLOfPositives(TestADL):
    options: Mapping[str, Any] = {"beta": 0.5, "gamma": 2.0, "divide_by": "positives"}

    def count(self, scores: list[float], positives: int) -> float:
        return positives


class TestADLAsReleased(TestADL):
    """With the cross-entropy, the least value is not 0; the gradient vanishes there."""

    options: Mapping[str, Any] = {"error": "cross_entropy", "ignored": False}

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, _ = self.views(OBJECTS)
        twin = student.mapped(torch.clone)
        (value,) = self.run(self.loss(self.student, self.student), student, twin).values()
        value.backward()
        assert all(x.grad.abs().max() < 1e-12 for x in student.class_logits.values())


def test_adl_as_released_has_the_gradient_of_its_kernel() -> None:
    """With A = 1 - exp(-D), D = BCE(p, q), of one logit: 2 A exp(-D) (p - q) BCE + A^2 (p - q), times the weight."""
    z, p, q = math.log(0.3 / 0.7), 0.3, 0.9
    logit, other = torch.tensor(z, dtype=torch.float64, requires_grad=True), torch.tensor(math.log(9)).double()
    value = adaptive_divergence(logit, other, beta=1.0, gamma=2.0, error="cross_entropy")
    bce = -q * math.log(p) - (1 - q) * math.log(1 - p)
    a = 1 - math.exp(-bce)
    assert value.item() == pytest.approx(a**2 * bce)
    (slope,) = torch.autograd.grad(value, logit)
    assert slope.item() == pytest.approx(2 * a * math.exp(-bce) * (p - q) * bce + a**2 * (p - q))


def test_adl_needs_no_ground_truth_but_for_positives_and_ignored_anchors() -> None:
    dense = TestADL.student
    assert ADL(dense, dense).truth_terms == []
    for options in ({"ignored": False}, {"divide_by": "positives"}):
        assert ADL(dense, dense, **options).truth_terms == ["logits.classes"]
    with pytest.raises(DistillError, match=r"error of divergence or cross_entropy, got .*error=kl"):
        ADL(dense, dense, error="kl")


class TestBCKD(Dense):
    relative = 1e-6  # anchors are float32
    options: Mapping[str, Any] = {}

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return BCKD(student, teacher, **self.options)

    def overlap(self, box: list[float], other: list[float]) -> float:
        return generalized_box_iou(torch.tensor([box]), torch.tensor([other])).item()

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        corners = torch.cat(list(student.stages["anchors"].values())).tolist() * len(student.batch)
        deltas = [[row for image in slow_rows(view, "deltas", 4) for row in image] for view in (student, teacher)]
        sums, positives = [0.0, 0.0], sum(max(1, int((x > 0).sum())) for x in student.stages["anchor_targets"].labels)
        rows = zip(self.anchors(student, teacher), corners, *deltas, strict=True)
        for (label, own, other), anchor, delta, target in rows:
            if label < 0:
                continue
            p, q = [sigmoid(a) for a in own], [sigmoid(b) for b in other]
            gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
            sums[0] -= sum(
                w * (b * math.log(a) + (1 - b) * math.log(1 - a)) for w, a, b in zip(gaps, p, q, strict=True)
            )
            boxes = [[corner + move for corner, move in zip(anchor, moves, strict=True)] for moves in (delta, target)]
            sums[1] += max(gaps) * (1 - self.overlap(*boxes))
        terms = ("logits.classes", "logits.boxes")
        return {term: value / positives for term, value in zip(terms, sums, strict=True)}


class TestBCKDOfIoU(TestBCKD):
    options: Mapping[str, Any] = {"box_error": "iou"}

    def overlap(self, box: list[float], other: list[float]) -> float:
        return iou(box, other)


def test_bckd_sends_a_gradient_through_the_weight_of_classes_but_not_of_boxes() -> None:
    """One anchor and class at student p = 1/2, teacher q: d/dz |p - q| BCE(p, q), with p = sigmoid z."""
    dense = spec(("cat",), two_stage=False, strides=(8,), anchors=1)
    student, teacher = (random_view(batch([OBJECTS[0]], 8, 8), dense, seed) for seed in (1, 2))
    z = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    student.stages["class_logits"] = {8: z}
    teacher.stages["class_logits"] = {8: torch.full_like(z, math.log(9))}  # q = 0.9
    assert student.stages["anchor_targets"].labels.tolist() == [[1]]
    values = BCKD(dense, dense)(student, teacher)
    (slope,) = torch.autograd.grad(values["logits.classes"], z)
    assert slope.item() == pytest.approx(-0.25 * math.log(2) + 0.4 * (0.5 - 0.9))
    assert not values["logits.boxes"].requires_grad


def test_bckd_can_leave_out_levels_without_positive_anchors() -> None:
    """The coarse levels have no positive anchor, whatever their logits."""
    student, teacher = TestBCKD().views(OBJECTS)
    labels = student.stages["anchor_targets"].labels
    labels[:, len(student.stages["anchors"][8]) :].clamp_(max=0)
    fine = BCKD(TestBCKD.student, TestBCKD.teacher, levels="positive")
    values = {name: value.item() for name, value in fine(student, teacher).items()}
    labels[:, len(student.stages["anchors"][8]) :] = -1
    expected = BCKD(TestBCKD.student, TestBCKD.teacher)(student, teacher)
    assert values == pytest.approx({name: value.item() for name, value in expected.items()})
    with pytest.raises(DistillError, match="levels of all or positive, got box_error=giou and levels=some"):
        BCKD(TestBCKD.student, TestBCKD.teacher, levels="some")


def test_entropy_of_a_sure_and_of_an_unsure_teacher() -> None:
    assert entropy(torch.tensor([0.0, 60.0, -60.0])).tolist() == pytest.approx([math.log(2), 0, 0], abs=1e-6)


def test_quality_focal_loss_vanishes_between_equals_and_passes_its_weight_a_gradient() -> None:
    logits = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    assert not heads.quality_focal(logits, logits.detach()).any()
    (slope,) = torch.autograd.grad(heads.quality_focal(logits, torch.tensor([1.0, 1.0]).double()).sum(), logits)
    step = 1e-6
    values = [heads.quality_focal(logits.detach() + move, torch.ones(2).double()) for move in (step, -step)]
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", [ADL, BCKD, Response])
def test_classes_are_matched_by_name_and_pairs_are_checked(loss: Any) -> None:
    few, many = (spec(names, two_stage=False) for names in (("cat", "dog"), ("dog", "hen", "cat")))
    student, teacher = random_view(batch(OBJECTS), few, 1), random_view(batch(OBJECTS), many, 2)
    same = random_view(batch(OBJECTS), few, 2)
    same.stages |= {"deltas": teacher.deltas}
    same.stages["class_logits"] = {
        at: x.unflatten(1, (3, 3))[:, :, [2, 0]].flatten(1, 2) for at, x in teacher.class_logits.items()
    }
    values, expected = loss(few, many)(student, teacher), loss(few, few)(student, same)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    with pytest.raises(DistillError, match="expected as many anchors per cell"):
        loss(few, spec(("cat", "dog"), two_stage=False, anchors=1))
