"""DIST: Pearson's coefficients by numpy, over regions and over the cells of each level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.dist import DIST, column_correlations, correlations
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid, OracleOfTwins


def pearson(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()) + 1e-8))


def slow_terms(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    x, y = student.detach().numpy(), teacher.detach().numpy()
    rows = [pearson(a, b) for a, b in zip(x, y, strict=True)]
    columns = [pearson(a, b) for a, b in zip(x.T, y.T, strict=True)]
    return 1 - float(np.mean(rows)), 1 - float(np.mean(columns))


class NearlyEqual(OracleOfTwins):
    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        """The epsilon keeps a coefficient below 1."""
        student, _ = self.views(OBJECTS)
        values = self.run(self.loss(self.student, self.student), student, student.mapped(torch.clone))
        assert all(abs(value.item()) < 1e-5 for value in values.values())


class TestRegions(NearlyEqual):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DIST(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        pair = [torch.softmax(view.stages["roi_logits"][0], 1) for view in (student, teacher)]
        return dict(zip(("classes.inter", "classes.intra"), slow_terms(*pair), strict=True))


class TestDense(NearlyEqual):
    student = spec(two_stage=False, anchors=2, strides=(4, 8, 16, 32))
    teacher = spec(two_stage=False, anchors=2, strides=(4, 8, 16, 32))

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DIST(student, teacher, temperature=2.0)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        terms = {"classes.inter": 0.0, "classes.intra": 0.0}
        for at in student.class_logits:
            pair = [
                (view.class_logits[at] / 2).sigmoid().permute(0, 2, 3, 1).reshape(-1, view.class_logits[at].shape[1])
                for view in (student, teacher)
            ]
            for term, value in zip(terms, slow_terms(*pair), strict=True):
                terms[term] += 4 * value
        return terms


assert LossGrid in TestDense.__mro__


def test_rows_and_columns() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(5, 4).double(), torch.rand(5, 4).double()
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(student.numpy(), teacher.numpy(), strict=True)]
    assert correlations(student, teacher).tolist() == pytest.approx(expected, rel=1e-6)
    assert column_correlations(student.T, teacher.T).tolist() == pytest.approx(expected, rel=1e-6)


def test_without_regions_the_terms_are_attached_zeros() -> None:
    student, teacher = (random_view(batch([NOTHING]), spec(), seed, regions=0) for seed in (1, 2))
    for leaf in student.leaves():
        leaf.requires_grad_()
    values = DIST(spec(), spec())(student, teacher)
    assert [value.item() for value in values.values()] == [0, 0]
    assert all(value.requires_grad for value in values.values())


def test_refusals() -> None:
    with pytest.raises(DistillError, match="temperature: expected a number above 0"):
        DIST(spec(), spec(), temperature=-1)
    with pytest.raises(DistillError, match="has no rois"):
        DIST(spec(), spec(two_stage=False))
