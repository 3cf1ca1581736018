"""DETRPoints and DETRCorners, which share the student's additional pass: slow loops, and pairs that cannot work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.assignment import match_objects, set_targets
from distill.losses import queries
from distill.losses.base import DistillLoss
from distill.losses.detr_corners import DETRCorners
from distill.losses.detr_features import DETRFeatures
from distill.losses.detr_logits import DETRLogits
from distill.losses.detr_points import DETRPoints
from distill.types import DetectorSpec, DistillError
from helpers.fake_queries import QueryGrid, QueryView, query_spec, random_query_view
from helpers.fake_view import FakeView, batch, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.loss_states import SeveralLosses
from helpers.slow_queries import sigmoid, slow_bce, slow_kl, slow_l1, slow_overlap
from helpers.two_processes import assert_two_equal_one

pytest.importorskip("scipy", reason="the matching needs scipy")
ALL = {"classes": 1.0, "l1": 1.0, "giou": 1.0}


def slow_object(view: FakeView, image: int, index: int) -> list[float]:
    x1, y1, x2, y2 = (side / 64 for side in view.batch.targets[image].boxes[index].tolist())
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


class TestDETRPoints(QueryGrid, LossGrid):
    relative = 1e-6  # objects are float32

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DETRPoints(student, teacher, assignment=ALL)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        terms = dict.fromkeys(loss.weights, 0.0)
        for index, (s, t) in enumerate(zip(student.stages["decoded"], teacher.queries, strict=True)):
            sums, mass, matched = [0.0] * 6, 0.0, 0
            for image, targets in enumerate(teacher.query_targets[index]):
                owner = dict(zip(*(x.tolist() for x in targets), strict=True))
                matched += len(owner)
                for i in range(s.logits.shape[1]):
                    z, y = s.logits[image, i].tolist(), t.logits[image, i].tolist()
                    box, other = s.boxes[image, i].tolist(), t.boxes[image, i].tolist()
                    weight = max(map(sigmoid, y))
                    mass += weight
                    values = slow_bce(z, y), slow_l1(box, other), 1 - slow_overlap(box, other)[1]
                    sums[:3] = [total + weight * value for total, value in zip(sums[:3], values, strict=True)]
                    truth = slow_object(student, image, owner[i]) if i in owner else None
                    for label, logit in enumerate(z):
                        p = sigmoid(logit)
                        if truth and label == 0:
                            q = slow_overlap(box, truth)[0]
                            sums[3] -= q * (q * math.log(p) + (1 - q) * math.log(1 - p))
                        else:
                            sums[3] -= 0.75 * p**2 * math.log(1 - p)
                    if truth:
                        sums[4] += slow_l1(box, truth)
                        sums[5] += 1 - slow_overlap(box, truth)[1]
            counts = [mass] * 3 + [max(1, matched)] * 3
            for term, total, count in zip(terms, sums, counts, strict=True):
                terms[term] += total / count
        return terms

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, teacher = self.views(OBJECTS)
        student.stages["decoded"] = [type(x)(*(y.clone() for y in x)) for x in teacher.queries]
        values = self.run(DETRPoints(self.student, self.student), student, teacher)
        assert values["points.l1"].item() == 0
        assert values["points.giou"].item() == pytest.approx(0, abs=1e-12)
        values["points.classes"].backward()
        assert all(layer.logits.grad.abs().max() < 1e-12 for layer in student.stages["decoded"])

    def test_each_term_falls_when_only_it_is_minimised(self) -> None:
        """The IoU is a target of VFL too, so its term alone may move boxes; the teacher's terms fall."""
        loss = DETRPoints(self.student, self.teacher)
        for term in loss.weights:
            student, teacher = self.views(OBJECTS)
            first = self.run(loss, student, teacher)[term]
            optimizer = torch.optim.Adam(student.leaves(), lr=0.02)
            first.backward()
            optimizer.step()
            assert loss(student, teacher)[term] < first, term


def test_the_student_can_match_its_additional_pass_itself() -> None:
    """With decoders of unequal depth, and the teacher's matches far off."""
    images, known = batch(OBJECTS), query_spec()
    student = random_query_view(images, known, 1, layers=3)
    teacher = random_query_view(images, known, 2, layers=2)
    objects = set_targets(images)
    matches = match_objects(student.stages["decoded"], objects)
    twin = QueryView(images, known, **{**teacher.stages, "query_targets": matches[1:]})
    none = dict.fromkeys(ALL, 0.0)
    values = DETRPoints(known, known, none, ALL, assigned_by="student")(student, teacher)
    expected = DETRPoints(known, known, none, ALL)(student, twin)
    assert {name: value.item() for name, value in values.items()} == {k: v.item() for k, v in expected.items()}
    other = DETRPoints(known, known, none, ALL)(student, teacher)
    assert all(values[name] != other[name] for name in values)


class CornersGrid(QueryGrid, LossGrid):
    relative = 1e-6
    pairs = "points"

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DETRCorners(student, teacher, {"pairs": self.pairs})

    def compared(self, student: FakeView, teacher: FakeView) -> list[list[list[tuple[int, int, int | None]]]]:
        """For each layer and image: the student's query, the teacher's, and the object."""
        raise NotImplementedError

    def layers(self, student: FakeView) -> list[object]:
        raise NotImplementedError

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        total = 0.0
        rows = zip(self.layers(student), teacher.queries, self.compared(student, teacher), strict=True)
        for s, t, images in rows:
            values: dict[bool, list[float]] = {True: [], False: []}
            for image, pairs in enumerate(images):
                for i, j, owner in pairs:
                    weight = max(map(sigmoid, t.logits[image, j].tolist()))
                    if owner is not None:
                        weight = slow_overlap(s.boxes[image, i].tolist(), slow_object(student, image, owner))[0]
                    rows = zip(s.corners[image, i].tolist(), t.corners[image, j].tolist(), strict=True)
                    sides = [slow_kl(*side, 5) for side in rows]
                    values[owner is not None].append(weight * sum(sides) / 4)
            roots = {kind: math.sqrt(len(own)) for kind, own in values.items()}
            total += sum(roots[k] * sum(own) / len(own) for k, own in values.items() if own) / sum(roots.values())
        return {"corners.divergence": total}


class TestCornersOfPoints(CornersGrid):
    def layers(self, student: FakeView) -> list[object]:
        return student.stages["decoded"]

    def compared(self, student: FakeView, teacher: FakeView) -> list[list[list[tuple[int, int, int | None]]]]:
        count = student.queries[0].logits.shape[1]
        owners = [[dict(zip(*(x.tolist() for x in own), strict=True)) for own in x] for x in teacher.query_targets]
        return [[[(i, i, owner.get(i)) for i in range(count)] for owner in images] for images in owners]

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, teacher = self.views(OBJECTS)
        student.stages["decoded"] = [type(x)(*(y.clone() for y in x)) for x in teacher.queries]
        values = self.run(self.loss(self.student, self.student), student, teacher)
        assert values["corners.divergence"].item() == pytest.approx(0, abs=1e-12)


class TestCornersOfMatches(CornersGrid):
    pairs = "matching"

    def layers(self, student: FakeView) -> list[object]:
        return student.queries

    def compared(self, student: FakeView, teacher: FakeView) -> list[list[list[tuple[int, int, int | None]]]]:
        """The assignment is tested in test_detr_logits.py: here it comes from the same function."""
        classes = DETRLogits(self.student, self.teacher).classes
        layers = zip(student.queries, teacher.queries, strict=True)
        pairs = [(queries.own(s), queries.taught(t, classes)) for s, t in layers]
        found = []
        for layer, ((image, i), (_, j)) in enumerate(queries.match_queries(pairs)):
            owners = [dict(zip(*(x.tolist() for x in own), strict=True)) for own in student.query_targets[layer]]
            rows: list[list[tuple[int, int, int | None]]] = [[] for _ in owners]
            for b, own, other in zip(image.tolist(), i.tolist(), j.tolist(), strict=True):
                rows[b].append((own, other, owners[b].get(own)))
            found.append(rows)
        return found


def make(normalizer: str) -> DistillLoss:
    known, how = (query_spec(), query_spec()), {"normalizer": normalizer}
    return SeveralLosses(
        logits=DETRLogits(*known, **how),
        points=DETRPoints(*known, assignment=ALL, **how),
        corners=DETRCorners(*known, **how),
        features=DETRFeatures(*known, **how),
    ).double()


def scene() -> tuple[QueryView, QueryView]:
    images = batch([OBJECTS[0], OBJECTS[1], NOTHING, OBJECTS[1]])
    return random_query_view(images, query_spec(), 1), random_query_view(images, query_spec(), 2)


def test_terms_that_read_ground_truth_are_known() -> None:
    """`data.unlabeled` without boxes refuses them before a teacher is trained."""
    pair = query_spec(), query_spec()
    assert DETRPoints(*pair, assignment=ALL).truth_terms == [f"assignment.{name}" for name in ALL]
    assert DETRPoints(*pair, assignment=dict.fromkeys(ALL, 0.0)).truth_terms == []
    assert DETRCorners(*pair).truth_terms == ["corners.divergence"]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Of queries and cells, both processes have equally many."""
    assert_two_equal_one(make, scene, tmp_path, relative=1e-6, differ=("points", "corners"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DETRPoints(query_spec(), spec()), "points: the teacher is a faster_rcnn, which has no queries"),
        (lambda: DETRPoints(query_spec(strides=(8, 16)), query_spec()), r"equal strides.*model\.strides=\[8, 16\]"),
        (
            lambda: DETRCorners(query_spec(bins={}), query_spec()),
            "student is a rtdetr, which has no corner",
        ),
        (
            lambda: DETRCorners(query_spec(), query_spec(bins={"count": 33, "limit": 0.5, "scale": 4.0})),
            r"expected equal bins.*model\.bins=8 beside teacher\.model\.bins=32\. .*\(teacher\.model\.bins=8;",
        ),
        (
            lambda: DETRCorners(query_spec(strides=(16, 32)), query_spec()),
            r"model\.strides=\[16, 32\] and teacher\.model\.strides=\[8, 16, 32\]\. Set corners\.pairs=matching",
        ),
        (
            lambda: DETRCorners(query_spec(), query_spec(), {"pairs": "iou"}),
            "expected points or matching",
        ),
        (
            lambda: DETRPoints(query_spec(), query_spec(), assigned_by="both"),
            "assigned_by: expected teacher or student",
        ),
    ],
)
def test_what_cannot_work_is_refused(build: Callable[[], DistillLoss], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        build()
