"""DETRLogits: a brute-force assignment, decoders of unequal depth, and the best queries."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.losses.base import DistillLoss
from distill.losses.detr_logits import DETRLogits
from distill.types import Batch, DetectorSpec, DistillError, QueryLayer
from helpers.fake_queries import QueryGrid, query_spec, random_query_view
from helpers.fake_view import FakeView, batch, spec
from helpers.loss_grid import OBJECTS, LossGrid
from helpers.slow_queries import slow_bce, slow_l1, slow_overlap

pytest.importorskip("scipy", reason="the matching needs scipy")


def slow_clipped(box: list[float]) -> list[float]:
    (x, y, w, h), clip = box, lambda side: min(max(side, 0.0), 1.0)
    left, top, right, bottom = map(clip, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def slow_distances(student: QueryLayer, teacher: QueryLayer, image: int, i: int, j: int) -> list[float]:
    boxes = student.boxes[image, i].tolist(), slow_clipped(teacher.boxes[image, j].tolist())
    classes = slow_bce(student.logits[image, i].tolist(), teacher.logits[image, j].tolist())
    return [classes, slow_l1(*boxes), 1 - slow_overlap(*boxes)[1]]


def slow_terms(student: QueryLayer, teacher: QueryLayer) -> list[float]:
    totals, count = [0.0] * 3, 0
    for image in range(len(student.logits)):
        sizes = student.logits.shape[1], teacher.logits.shape[1]
        table = {
            (i, j): slow_distances(student, teacher, image, i, j) for i in range(sizes[0]) for j in range(sizes[1])
        }
        best: tuple[float, list[tuple[int, int]]] = (math.inf, [])
        for columns in itertools.permutations(range(max(sizes)), min(sizes)):
            pairs = [(r, c) if sizes[0] <= sizes[1] else (c, r) for r, c in enumerate(columns)]
            best = min(best, (sum(table[p][0] + 5 * table[p][1] + 2 * table[p][2] for p in pairs), pairs))
        for pair in best[1]:
            totals = [total + value for total, value in zip(totals, table[pair], strict=True)]
        count += min(sizes)
    return [total / count for total in totals]


class TestDETRLogits(QueryGrid, LossGrid):
    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        return super().pair(images, **{**options, "regions": min(5, options.get("regions", 5))})

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DETRLogits(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        layers = [slow_terms(*pair) for pair in zip(student.queries, teacher.queries, strict=True)]
        return dict(
            zip(("queries.classes", "queries.l1", "queries.giou"), map(sum, zip(*layers, strict=True)), strict=True)
        )

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        """A cross-entropy has the entropy as its minimum, where its gradient vanishes."""
        student, _ = self.views(OBJECTS)
        values = self.run(self.loss(self.student, self.student), student, student.mapped(torch.clone))
        assert values["queries.l1"].item() == 0
        assert values["queries.giou"].item() == pytest.approx(0, abs=1e-12)
        values["queries.classes"].backward()
        assert all(layer.logits.grad.abs().max() < 1e-12 for layer in student.queries)


def test_the_last_layers_meet_and_a_deeper_decoder_starts_later() -> None:
    images, known = batch(OBJECTS), query_spec()
    student = random_query_view(images, known, 1, regions=3, layers=2)
    teacher = random_query_view(images, known, 2, regions=4, layers=3)
    for pair in ((student, teacher), (teacher, student)):
        values = DETRLogits(known, known)(*pair)
        layers = [slow_terms(*layers) for layers in zip(pair[0].queries[-2:], pair[1].queries[-2:], strict=True)]
        assert [value.item() for value in values.values()] == pytest.approx([sum(x) for x in zip(*layers, strict=True)])


def test_the_best_queries_alone_take_part() -> None:
    images, known = batch(OBJECTS), query_spec()
    student, teacher = (random_query_view(images, known, seed, regions=4, layers=1) for seed in (1, 2))
    chosen = teacher.queries[0].logits.amax(2).topk(2, dim=1).indices
    few = QueryLayer(*(torch.stack([x[i, chosen[i]] for i in range(2)]) for x in teacher.queries[0]))
    values = DETRLogits(known, known, {"top": 2})(student, teacher)
    assert [value.item() for value in values.values()] == pytest.approx(slow_terms(student.queries[0], few))


def test_the_teachers_boxes_are_clipped_to_the_image_and_not_to_its_padding() -> None:
    """The second image is 64 x 48 pixels (width x height) of 64 x 64."""
    images, known = batch(OBJECTS), query_spec()
    images = replace(images, sizes=((64, 64), (48, 64)))
    student, teacher, twin = (random_query_view(images, known, seed, regions=2, layers=1) for seed in (1, 2, 2))
    boxes = [[[0.9, 0.5, 0.4, 0.2], [0.5, 0.05, 0.5, 0.2]], [[0.2, 0.7, 0.5, 0.3], [0.3, 0.4, 0.2, 0.2]]]
    clipped = [[[0.85, 0.5, 0.3, 0.2], [0.5, 0.075, 0.5, 0.15]], [[0.225, 0.65, 0.45, 0.2], [0.3, 0.4, 0.2, 0.2]]]
    for view, given in ((teacher, boxes), (twin, clipped)):
        view.stages["queries"] = [view.queries[0]._replace(boxes=torch.tensor(given, dtype=torch.float64))]
    values = [value.item() for value in DETRLogits(known, known)(student, teacher).values()]
    assert values == pytest.approx(slow_terms(student.queries[0], twin.queries[0]))


def test_classes_are_matched_by_name() -> None:
    few, many = query_spec(("cat", "dog")), query_spec(("dog", "owl", "cat"))
    student, teacher = random_query_view(batch(OBJECTS), few, 1), random_query_view(batch(OBJECTS), many, 2)
    twin = random_query_view(batch(OBJECTS), few, 2)
    twin.stages["queries"] = [x._replace(logits=x.logits[..., [2, 0]]) for x in teacher.queries]
    values, expected = DETRLogits(few, many)(student, teacher), DETRLogits(few, few)(student, twin)
    assert all(torch.equal(values[name], expected[name]) for name in values)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(DistillError, match=r"queries: the student is a faster_rcnn, which has no queries"):
        DETRLogits(spec(), query_spec())
    with pytest.raises(DistillError, match=r"queries.top: expected a number of queries from 1, or null for all, got 0"):
        DETRLogits(query_spec(), query_spec(), {"top": 0})
