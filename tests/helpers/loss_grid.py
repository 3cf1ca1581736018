"""The grid that every distillation loss passes. A test file inherits it and adds the method's oracle:

class TestDeFeat(LossGrid):
    def loss(self, student, teacher): return DeFeat(student, teacher, ...)
    def oracle(self, loss, student, teacher): return {"neck.foreground": ..., ...}
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.types import Batch, DetectorSpec, DistillError
from helpers.fake_view import FakeView, anchors, batch, equal_views, random_view, spec

OBJECTS = [[[3.0, 5.0, 40.0, 30.0], [20.0, 20.0, 63.0, 63.0], [1.0, 50.0, 2.5, 60.0]], [[10.0, 8.0, 30.0, 60.0]]]
NOTHING: list[list[float]] = []


class LossGrid:
    """64 x 64 pixels, so the coarsest level is a single cell."""

    student = spec()
    teacher = spec()
    minimum = 0.0
    """Of each term, when student equals teacher."""
    twice = 1.0
    """Value of a batch that holds an image twice, relative to the image alone."""
    relative = 1e-10
    """Tolerance against the oracle, in float64."""

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        """Every term on. Without adapters, so that it takes float64 and vanishes when student equals teacher."""
        raise NotImplementedError

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        """The same with adapters, or as it is, where the method has none."""
        return self.loss(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        """Slow loops, written from the equation."""
        raise NotImplementedError

    # -- helpers

    def views(self, boxes: list[list[list[float]]], dtype: torch.dtype = torch.float64) -> tuple[FakeView, FakeView]:
        return self.pair(batch(boxes), dtype=dtype)

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        """Student and teacher looking at a batch: the place to give them what a method reads besides."""
        return random_view(images, self.student, 1, **options), random_view(images, self.teacher, 2, **options)

    @staticmethod
    def finite(values: dict[str, Tensor]) -> None:
        assert values
        for name, value in values.items():
            assert value.shape == (), name
            assert value.isfinite(), name
            assert value.requires_grad, f"{name} is detached"

    def run(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, Tensor]:
        for view in (student, teacher):
            for leaf in view.leaves():
                leaf.requires_grad_()
        if student.leaves()[0].dtype == torch.float64:
            loss.double()  # its trained layers
        values = loss(student, teacher)
        assert values.keys() == loss.weights.keys()
        return values

    # -- the grid

    @pytest.mark.parametrize(
        "boxes", [OBJECTS, [OBJECTS[0], NOTHING], [NOTHING, NOTHING]], ids=["full", "half", "empty"]
    )
    def test_equals_its_oracle(self, boxes: list[list[list[float]]]) -> None:
        student, teacher = self.views(boxes)
        loss = self.loss(self.student, self.teacher)
        values = {name: value.item() for name, value in self.run(loss, student, teacher).items()}
        assert values == pytest.approx(self.oracle(loss, student, teacher), rel=self.relative, abs=1e-12)

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, _ = self.views(OBJECTS)
        values = self.run(self.loss(self.student, self.student), student, equal_views(student))
        for name, value in values.items():
            assert value.item() == pytest.approx(self.minimum, abs=1e-12), name

    @pytest.mark.parametrize("adapted", [False, True])
    def test_gradient_reaches_student_and_adapter_but_never_the_teacher(self, adapted: bool) -> None:
        student, teacher = self.views(OBJECTS, torch.float32)
        loss = (self.adapted if adapted else self.loss)(self.student, self.teacher)
        for value in (values := self.run(loss, student, teacher)).values():
            gradient = torch.autograd.grad(value, student.leaves(), allow_unused=True, retain_graph=True)
            assert any(part is not None and part.abs().sum() > 0 for part in gradient)
        sum(values.values()).backward()
        assert all(leaf.grad is None for leaf in teacher.leaves())
        moved: dict[str, bool] = {}
        for name, parameter in loss.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            kind = re.sub(r"\.\d+\b", "", name)  # the same of all levels, of which some may hold no object
            moved[kind] = moved.get(kind, False) or bool(parameter.grad.any())
        assert all(moved.values()), moved

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [1.0, 60000.0])
    def test_half_precision_stays_finite(self, dtype: torch.dtype, size: float) -> None:
        student, teacher = (view.mapped(lambda x: (x.clamp(-1, 1) * size).to(dtype)) for view in self.views(OBJECTS))
        values = self.run(self.loss(self.student, self.teacher), student, teacher)
        self.finite(values)
        assert all(value.dtype == torch.float32 for value in values.values())
        # Scaled, as a scaler would, to a gradient that half a precision can hold.
        (sum(values.values()) / size).backward()  # type: ignore[union-attr]
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in student.leaves())

    def test_autocast_changes_adapters_only(self) -> None:
        student, teacher = self.views(OBJECTS, torch.float32)
        exact = self.run(self.loss(self.student, self.teacher), student, teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = self.run(self.loss(self.student, self.teacher), student, teacher)
            self.finite(self.run(self.adapted(self.student, self.teacher), student, teacher))
        for name, value in values.items():
            assert value.item() == pytest.approx(exact[name].item(), rel=1e-6), name

    @pytest.mark.parametrize("boxes", [[NOTHING], [NOTHING, OBJECTS[0]]])
    def test_zeros_stay_attached(self, boxes: list[list[list[float]]]) -> None:
        student, teacher = self.views(boxes, torch.float32)
        loss = self.adapted(self.student, self.teacher)
        self.finite(values := self.run(loss, student, teacher))
        sum(values.values()).backward()
        assert all(parameter.grad is not None for parameter in loss.parameters())

    def test_no_regions_at_all_is_survived(self) -> None:
        student, teacher = self.pair(batch([NOTHING]), regions=0)
        self.finite(self.run(self.loss(self.student, self.teacher), student, teacher))

    def test_an_image_twice(self) -> None:
        loss = self.loss(self.student, self.teacher)
        once = self.run(loss, *self.views(OBJECTS[:1]))
        images = batch([OBJECTS[0]] * 2)
        images = replace(images, ids=(images.ids[0],) * 2)
        for name, value in self.run(loss, *self.pair(images)).items():
            assert value.item() == pytest.approx(self.twice * once[name].item(), rel=max(1e-9, self.relative)), name

    def test_each_term_falls_when_only_it_is_minimised(self) -> None:
        loss = self.loss(self.student, self.teacher)
        for term in loss.weights:
            student, teacher = self.views(OBJECTS)
            value = first = self.run(loss, student, teacher)[term]
            optimizer = torch.optim.Adam(student.leaves(), lr=0.02)
            for _ in range(5):
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                value = loss(student, teacher)[term]
            assert value < first, f"{term}: from {first.item()} to {value.item()}"

    def reseeded(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> DistillLoss:
        """`adapted`, built with another seed."""
        plain = self.adapted(self.student, self.teacher)
        kind = type(getattr(plain, "of", plain))  # a wrapper's seed is that of what it wraps
        build = kind.__init__
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__init__", lambda *given, **options: build(*given, **{**options, "seed": seed}))
            return self.adapted(self.student, self.teacher)

    def test_draws_leave_the_global_stream_alone_and_depend_on_the_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = torch.get_rng_state()
        first = self.adapted(self.student, self.teacher)
        second = self.adapted(self.student, self.teacher)
        values = [self.run(loss, *self.views(OBJECTS, torch.float32)) for loss in (first, second)]
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
        other = self.reseeded(3, monkeypatch)
        assert (other.seed, first.seed) == (3, 0)
        kernels = [
            name for name, parameter in first.named_parameters() if parameter.ndim == 4 and "reweigh" not in name
        ]
        parameters, repeated, reseeded = (dict(loss.named_parameters()) for loss in (first, second, other))
        for name in kernels:
            assert torch.equal(parameters[name], repeated[name]), name
            assert not torch.equal(parameters[name], reseeded[name]), name

    def test_a_wrong_shape_is_refused(self) -> None:
        student, teacher = self.views(OBJECTS)
        wrong = student.mapped(lambda x: x[..., :-1] if x.shape[-1] > 1 else x.expand(*x.shape[:-1], 2))
        with pytest.raises(DistillError, match=r"expected student and teacher of equal shape, got the student's \("):
            self.loss(self.student, self.teacher)(wrong, teacher)


class TrainedLayers(LossGrid):
    """A loss with layers of its own between both models: it does not vanish between equals, and autocast changes it."""

    test_is_at_its_minimum_when_student_equals_teacher = None
    test_autocast_changes_adapters_only = None

    def test_autocast_keeps_its_terms_finite(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = self.run(self.loss(self.student, self.teacher), *self.views(OBJECTS, torch.float32))
        self.finite(values)
        assert all(value.dtype == torch.float32 for value in values.values())


class OracleOfTwins(LossGrid):
    """A batch that holds an image twice has a value of its own: statistics of the batch, or draws."""

    def test_an_image_twice(self) -> None:
        loss = self.loss(self.student, self.teacher)
        images = batch([OBJECTS[0]] * 2)
        student, teacher = self.pair(replace(images, ids=(images.ids[0],) * 2))
        values = {name: value.item() for name, value in self.run(loss, student, teacher).items()}
        assert values == pytest.approx(self.oracle(loss, student, teacher), rel=self.relative)


class AnchorsFollowMaps(LossGrid):
    def test_a_wrong_shape_is_refused(self) -> None:
        """As in a real view, where the student's maps are narrower its anchors are fewer."""
        student, teacher = self.views(OBJECTS)
        wrong = student.mapped(lambda x: x[..., :-1] if x.shape[-1] > 1 else x.expand(*x.shape[:-1], 2))
        grid = {stride: (x.shape[2], x.shape[3]) for stride, x in wrong.neck.items()}
        wrong.stages["anchors"] = {s: anchors(*size, s, self.student.anchors[s]) for s, size in grid.items()}
        with pytest.raises(DistillError, match=r"expected student and teacher of equal shape, got the student's \("):
            self.loss(self.student, self.teacher)(wrong, teacher)
