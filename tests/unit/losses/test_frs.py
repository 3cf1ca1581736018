"""FRS: its two terms by loops over cells, for class scores and for objectness."""

from __future__ import annotations

import math

import pytest
import torch

from distill.losses.base import DistillLoss
from distill.losses.frs import FRS
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class TestFRS(LossGrid):
    student = spec(two_stage=False)
    teacher = spec(two_stage=False)
    stage = "class_logits"

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return FRS(student, teacher, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return FRS(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        terms = {"neck.features": 0.0, "logits.classes": 0.0}
        for at, x in student.neck.items():
            sums, mass = [0.0, 0.0], 0.0
            own, target = (view.stages[self.stage][at] for view in (student, teacher))
            for image in range(len(x)):
                for cell in torch.cartesian_prod(torch.arange(x.shape[2]), torch.arange(x.shape[3])).tolist():
                    here = (image, slice(None), *cell)
                    scores = [sigmoid(z) for z in target[here].tolist()]
                    richness = max(scores)
                    mass += richness
                    pairs = zip(x[here].tolist(), teacher.neck[at][here].tolist(), strict=True)
                    sums[0] += richness * sum((a - b) ** 2 for a, b in pairs)
                    own_scores = [sigmoid(z) for z in own[here].tolist()]
                    sums[1] -= richness * sum(
                        q * math.log(p) + (1 - q) * math.log(1 - p) for p, q in zip(own_scores, scores, strict=True)
                    )
            for term, total in zip(terms, sums, strict=True):
                terms[term] += total / mass
        return terms

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        """A cross-entropy has the entropy as its minimum, where its gradient vanishes."""
        student, _ = self.views(OBJECTS)
        teacher = student.mapped(torch.clone)
        values = self.run(self.loss(self.student, self.teacher), student, teacher)
        assert values["neck.features"].item() == 0
        sum(values.values()).backward()
        assert all(x.grad is None or x.grad.abs().max() < 1e-12 for x in student.leaves())


class TestObjectness(TestFRS):
    student = spec()
    teacher = spec()
    stage = "objectness"


def test_the_mask_is_that_of_all_classes_of_the_teacher() -> None:
    few, many = spec(("cat",), two_stage=False), spec(("dog", "cat"), two_stage=False)
    student, teacher = random_view(batch(OBJECTS), few, 1), random_view(batch(OBJECTS), many, 2)
    values = FRS(few, many, neck={"levels": 1}, adapter={"kernel": None})(student, teacher)
    mask = teacher.class_logits[4].amax(1).sigmoid()
    error = (student.neck[4] - teacher.neck[4]).square().sum(1)
    torch.testing.assert_close(values["neck.features"], (mask * error).sum() / mask.sum())


def test_families_must_agree_on_their_scores() -> None:
    with pytest.raises(DistillError, match="logits: the student is a faster_rcnn, which has no class_logits"):
        FRS(spec(), spec(two_stage=False))
