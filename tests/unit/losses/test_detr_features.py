"""DETRFeatures: the mask by loops over queries and cells, for a student of another family."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.losses.base import DistillLoss
from distill.losses.detr_features import DETRFeatures, query_qualities, target_mask
from distill.types import Batch, DetectorSpec, DistillError, MissingTargets
from helpers.fake_queries import query_spec, random_query_view
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid
from helpers.slow_queries import sigmoid, slow_overlap

TOP = 9


def slow_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


class TestDETRFeatures(LossGrid):
    student = spec(neck=6)
    teacher = query_spec(neck=6)
    relative = 1e-6  # objects are float32

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        return random_view(images, self.student, 1, **options), random_query_view(images, self.teacher, 2, **options)

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DETRFeatures(student, teacher, top=TOP, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DETRFeatures(student, teacher, top=TOP, adapter={"kernel": 1})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        total = 0.0
        for layer in teacher.queries:
            for stride, features in teacher.neck.items():
                cells = list(torch.cartesian_prod(*(torch.arange(side) for side in features.shape[2:])).tolist())
                error = 0.0
                for image, target in enumerate(teacher.batch.targets):
                    scores = sorted(
                        ((sigmoid(z), q) for q, row in enumerate(layer.logits[image].tolist()) for z in row),
                        reverse=True,
                    )
                    mask = []
                    for i, j in cells:
                        here, value = features[image, :, i, j].tolist(), 0.0
                        for score, query in scores[:TOP]:
                            truth = [[side / 64 for side in box] for box in target.boxes.tolist()]
                            centers = [[(a + c) / 2, (b + d) / 2, c - a, d - b] for a, b, c, d in truth]
                            box = layer.boxes[image, query].tolist()
                            overlap = max((slow_overlap(box, center)[0] for center in centers), default=1.0)
                            value += score * overlap * slow_cosine(layer.hidden[image, query].tolist(), here)
                        mask.append(max(value, 0.01))
                    for m, (i, j) in zip(mask, cells, strict=True):
                        pairs = zip(
                            student.neck[stride][image, :, i, j].tolist(),
                            features[image, :, i, j].tolist(),
                            strict=True,
                        )
                        error += sum((m / max(mask) * (s - t)) ** 2 for s, t in pairs)
                total += error / features.numel()
        return {"neck.features": total}

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, teacher = self.views(OBJECTS)
        student.stages["neck"] |= {stride: x.clone() for stride, x in teacher.neck.items()}
        assert self.run(self.loss(self.student, self.teacher), student, teacher)["neck.features"].item() == 0


def test_a_mask_without_any_similar_cell_is_one_everywhere() -> None:
    features = torch.ones(1, 2, 3, 3)
    assert torch.equal(target_mask(features, -torch.ones(1, 4, 2), torch.ones(1, 4)), torch.ones(1, 3, 3))


def test_the_score_alone_counts_where_the_objects_are_not_known() -> None:
    layer = random_query_view(batch(OBJECTS), query_spec(), 2).queries[0]
    _, quality = query_qualities(layer, replace(batch(OBJECTS), targets=MissingTargets()), TOP)
    assert torch.equal(quality, layer.logits.sigmoid().flatten(1).topk(TOP).values)
    assert DETRFeatures(spec(), query_spec()).truth_terms == []


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(DistillError, match="neck: the teacher is a faster_rcnn, which has no queries"):
        DETRFeatures(query_spec(), spec())
    with pytest.raises(DistillError, match="top: expected a number of queries from 1, got 0"):
        DETRFeatures(spec(), query_spec(), top=0)
    for channels in (None, 6):
        DETRFeatures(spec(), replace(query_spec(neck=6), query_channels=channels))
    with pytest.raises(
        DistillError, match=r"got teacher\.model\.decoder_channels=4 and teacher.*=6.*teacher=rtdetr_r50"
    ):
        DETRFeatures(spec(), replace(query_spec(neck=6), query_channels=4))
    DETRFeatures(spec(), replace(query_spec(neck=6), query_channels=4), {"features": 0.0})
    teacher = random_query_view(batch(OBJECTS), query_spec(neck=6), 2)
    teacher.stages["queries"] = [x._replace(hidden=x.hidden[..., :4]) for x in teacher.queries]
    with pytest.raises(DistillError, match=r"hidden states have as many channels as its neck, got .*=4 and .*=6"):
        DETRFeatures(spec(), query_spec())(random_view(batch(OBJECTS), spec(), 1), teacher)
