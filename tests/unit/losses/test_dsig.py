"""DSIG: golden values of the reference code, slow oracles, and each promise of its options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.losses import base, dsig
from distill.losses.base import DistillLoss
from distill.losses.dsig import DSIG
from distill.losses.kernels.graph import graph_errors
from distill.types import AnchorTargets, Detections, DetectorSpec, DistillError, Regions
from helpers.fake_queries import query_spec
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.two_processes import run_in_two_processes

ONE_STAGE = spec(two_stage=False)
PREDICTED: dict[str, Mapping[str, Any]] = {
    "nodes": {"foreground": 0, "background": 0, "predicted": 0.5},
    "edges": {"all": 1, "mining": None},
    "logits": {"classes": 1, "boxes": 1},
}
OFF: dict[str, Mapping[str, Any]] = {
    "nodes": {"foreground": 0, "background": 0},
    "edges": {"all": 0},
    "neck": {"all": 0},
    "logits": {"classes": 0, "boxes": 0},
}


def only(**options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Options with these terms alone."""
    return {place: {**off, **options.get(place, {})} for place, off in OFF.items()}


# -- the reference code's values


def ramp(shape: tuple[int, ...], k: float, o: float, a: float = 1.0) -> Tensor:
    return a * torch.sin(k * torch.arange(math.prod(shape), dtype=torch.float64) + o).reshape(shape)


FOREGROUND, BACKGROUND = (2, 3), (4, 5)  # of two images


def golden_logits() -> Tensor:
    """Of the 9 background regions; the reference has background in the last column, we in the first."""
    logits = ramp((9, 4), 0.9, 0, 1.5)
    logits[:, 3] += 0.35 * torch.arange(9)
    return logits[:, [3, 0, 1, 2]]


def interleaved(foreground: Tensor, background: Tensor) -> Tensor:
    """The regions of the first image, then those of the second: foreground, then background."""
    (f1, f2), (b1, b2) = foreground.split(FOREGROUND), background.split(BACKGROUND)
    return torch.cat([f1, b1, f2, b2])


def golden_views() -> tuple[FakeView, FakeView]:
    known, images = spec(classes=("a", "b", "c"), neck=4), batch([NOTHING, NOTHING])
    labels = [torch.tensor([1] * f + [0] * b) for f, b in zip(FOREGROUND, BACKGROUND, strict=True)]
    boxes = [torch.zeros(len(image_labels), 4) for image_labels in labels]
    students = ramp((5, 4, 7, 7), 0.011, 0), ramp((9, 4, 7, 7), 0.017, 0.4)
    teachers = ramp((5, 4, 7, 7), 0.013, 0.2), ramp((9, 4, 7, 7), 0.019, 0.6)
    logits = interleaved(torch.zeros(5, 4, dtype=torch.float64), golden_logits())
    return (
        FakeView(images, known, rois=Regions(boxes, labels, boxes, boxes), roi_features=interleaved(*students)),
        FakeView(images, known, roi_features=interleaved(*teachers), roi_logits=(logits, torch.zeros(14, 16))),
    )


def golden(**options: Mapping[str, Any]) -> dict[str, float]:
    student, teacher = golden_views()
    loss = DSIG(student.spec, teacher.spec, **only(**options))
    return {name: value.item() for name, value in loss(student, teacher).items()}


def test_golden_mining() -> None:
    expected = [1.70514, 0.546951, 2.332125, 0.15504, 2.089525, 0.179769, 0.653084, 0.361802, 0.05391]
    for threshold, kept in ((0.6, [0, 2, 4, 6]), (0.5, [0, 1, 2, 4, 6]), (3.0, [])):
        hard = dsig.mined(golden_logits(), threshold)
        assert hard.nonzero()[:, 0].tolist() == kept
    for row, value in enumerate(expected):
        logits = golden_logits()
        assert dsig.mined(logits, value - 1e-5)[row]
        assert not dsig.mined(logits, value + 1e-5)[row]


def test_golden_nodes() -> None:
    values = golden(nodes={"foreground": 1, "background": 1})
    assert values["nodes.foreground"] == pytest.approx(1.0752578880, rel=1e-6)
    assert values["nodes.background"] == pytest.approx(10.1233338004, rel=1e-6)
    fixed = golden(nodes={"background": 1, "alpha": None})
    assert fixed == {"nodes.background": pytest.approx(2.3270787605, rel=1e-6)}


@pytest.mark.parametrize(("mining", "value"), [(0.6, 0.1870504167), (None, 0.0594325459), (9.0, 0.0594325459)])
def test_golden_edges(mining: float | None, value: float) -> None:
    assert golden(edges={"all": 1, "mining": mining}) == {"edges.all": pytest.approx(value, rel=1e-6)}


# -- slow loops


def slow_node(student: Tensor, teacher: Tensor) -> float:
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return sum((s - t) ** 2 for s, t in pairs) / student.numel()


def slow_cosine(x: Tensor, y: Tensor) -> float:
    xs, ys = x.flatten().tolist(), y.flatten().tolist()
    dot = sum(a * b for a, b in zip(xs, ys, strict=True))
    return dot / math.sqrt(sum(a * a for a in xs)) / math.sqrt(sum(b * b for b in ys))


def slow_edges(student: Tensor, teacher: Tensor, nodes: Sequence[int]) -> float:
    total = 0.0
    for i in nodes:
        for j in nodes:
            total += 0.5 * (slow_cosine(teacher[i], teacher[j]) - slow_cosine(student[i], student[j])) ** 2
    return total / max(1, len(nodes) ** 2)


def plain_graph(student: Tensor, teacher: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, R, F), by autograd: all cosines of unit vectors."""
    cosines = [(n := torch.nn.functional.normalize(x, dim=2)) @ n.mT for x in (student, teacher)]
    pairs = member[:, :, None] & member[:, None]
    error = (pairs * (cosines[0] - cosines[1]).square()).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1) / 2
    return (student - teacher).square().mean(2), error


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_graph_equals_its_plain_form(nodes: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(nodes)
    pair = [torch.randn(3, nodes, 18, dtype=dtype) for _ in range(2)]
    member = torch.rand(3, nodes) < 0.7
    member[1] = False
    factors = torch.rand(3, nodes, dtype=dtype), torch.rand(3, dtype=dtype)
    results = []
    for compute in (graph_errors, plain_graph):
        leaf = pair[0].clone().requires_grad_()
        values = compute(leaf, pair[1], member)
        sum((value * factor).sum() for value, factor in zip(values, factors, strict=True)).backward()  # type: ignore[union-attr]
        assert leaf.grad is not None
        results.append((*values, leaf.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance * max(1e-3, expected.abs().max().item())
        )


def test_the_gradient_of_the_graph_is_that_of_its_value() -> None:
    torch.manual_seed(0)
    teacher, member = torch.randn(2, 5, 6).double(), torch.tensor([[True] * 5, [True, False, True, True, False]])
    student = torch.randn(2, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: graph_errors(x, teacher, member), student)
    assert torch.autograd.gradcheck(lambda x: graph_errors(x, teacher)[0], student)


def test_a_region_without_signal_has_a_bounded_gradient() -> None:
    """Its divisor is a thousandth of the longest feature's length, a constant; the others keep their own length."""
    torch.manual_seed(0)
    start, teacher, member = torch.randn(1, 4, 6).double(), torch.randn(1, 4, 6).double(), torch.ones(1, 4).bool()
    for shrink in (0.0, 1e-30, 1e-6):
        student = start.clone()
        student[0, 1] *= shrink
        student.requires_grad_()
        lengths = torch.linalg.vector_norm(student.detach(), dim=2, keepdim=True)
        shortest = 1e-3 * lengths.max()
        divisors = torch.where(lengths < shortest, shortest, torch.linalg.vector_norm(student, dim=2, keepdim=True))
        cosines = [
            (n := x / divisor) @ n.mT
            for x, divisor in ((student, divisors), (teacher, teacher.norm(dim=2, keepdim=True)))
        ]
        expected = 0.5 * (cosines[0] - cosines[1]).square().mean()
        (gradient,) = torch.autograd.grad(expected, student, retain_graph=True)
        value = graph_errors(student, teacher, member)[1]
        (actual,) = torch.autograd.grad(value.sum(), student)
        torch.testing.assert_close(value[0], expected)
        torch.testing.assert_close(actual, gradient)
        assert 0 < actual[0, 1].norm() < 4 / shortest


def test_the_graph_keeps_nothing_as_large_as_features_but_these() -> None:
    student, teacher = torch.randn(2, 5, 600).requires_grad_(), torch.randn(2, 5, 600)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        graph_errors(student, teacher, torch.ones(2, 5, dtype=torch.bool))
    large = [tensor for tensor in kept if tensor.numel() >= student.numel()]
    assert {tensor.data_ptr() for tensor in large} == {student.data_ptr(), teacher.data_ptr()}


@pytest.mark.parametrize("counts", [(3, 3), (1, 4), (0, 2), (0, 0)])
def test_regions_by_image_are_padded_with_zeros_and_stay_attached(counts: tuple[int, int]) -> None:
    x = torch.arange(1.0, 1 + 2 * sum(counts)).view(-1, 2).requires_grad_()
    padded = dsig.by_image(x, counts)
    assert padded.shape == (2, max(1, *counts), 2)
    assert padded.requires_grad
    for image, (rows, own) in enumerate(zip(torch.split(x, list(counts)), counts, strict=True)):
        assert torch.equal(padded[image, :own], rows)
        assert not padded[image, own:].any()


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(z) for z in logits]
    return [weight / sum(weights) for weight in weights]


def slow_kl(student: Sequence[float], teacher: Sequence[float], temperature: float) -> float:
    p, q = (softmax([z / temperature for z in logits]) for logits in (student, teacher))
    return temperature**2 * sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))


def slow_neck(student: FakeView, teacher: FakeView) -> float:
    return sum(slow_node(x, teacher.neck[stride]) for stride, x in student.neck.items())


def slow_graph(student: FakeView, teacher: FakeView) -> dict[str, float]:
    """Of a two-stage student, at alpha 7.5 and mining from 0.6 on."""
    terms = dict.fromkeys(("nodes.foreground", "nodes.background", "edges.all"), 0.0)
    start, images = 0, len(student.batch)
    student_features, teacher_features, logits = (
        student.roi_features([]),
        teacher.roi_features([]),
        teacher.roi_logits([])[0],
    )
    for labels in student.rois.labels:
        rows = range(start, start + len(labels))
        start += len(labels)
        foreground = [row for row, label in zip(rows, labels.tolist(), strict=True) if label > 0]
        background = [row for row in rows if row not in foreground]
        error = {row: slow_node(student_features[row], teacher_features[row]) for row in rows}
        if foreground:
            terms["nodes.foreground"] += 2 / images * sum(error[row] for row in foreground) / len(foreground)
        if background:
            mean = sum(error[row] for row in background) / len(background)
            terms["nodes.background"] += 2 / images * 7.5 * len(foreground) / len(background) * mean
        hard = [row for row in background if -math.log(softmax(logits[row].tolist())[0]) >= 0.6]
        terms["edges.all"] += 2 / images * slow_edges(student_features, teacher_features, foreground + hard)
    return terms


def slow_regions(student: FakeView, teacher: FakeView, temperature: float) -> dict[str, float]:
    labels = torch.cat(student.rois.labels).tolist()
    (logits, deltas), (their_logits, their_deltas) = student.roi_logits([]), teacher.roi_logits([])
    classes = boxes = 0.0
    for row, label in enumerate(labels):
        classes += slow_kl(logits[row].tolist(), their_logits[row].tolist(), temperature) / logits.shape[1]
        if label > 0:
            boxes += sum(abs(deltas[row, 4 * label + i] - their_deltas[row, 4 * label + i]).item() for i in range(4))
    count = max(1, len(labels))
    return {"logits.classes": classes / count, "logits.boxes": boxes / count}


def slow_anchors(student: FakeView, teacher: FakeView, temperature: float) -> dict[str, float]:
    """Anchor by anchor in the order (level, row, column, anchor)."""
    labels, classes = student.anchor_targets.labels, len(student.spec.classes)
    kl = l1 = 0.0
    valid = foreground = 0
    for image in range(len(student.batch)):
        number = 0
        for stride, logits in student.class_logits.items():
            for row in range(logits.shape[2]):
                for column in range(logits.shape[3]):
                    for anchor in range(student.spec.anchors[stride]):
                        label, number = labels[image, number].item(), number + 1
                        at = image, slice(anchor * classes, (anchor + 1) * classes), row, column
                        box = image, slice(anchor * 4, (anchor + 1) * 4), row, column
                        if label >= 0:
                            pair = logits[at].tolist(), teacher.class_logits[stride][at].tolist()
                            kl, valid = kl + slow_kl(*pair, temperature) / classes, valid + 1
                        if label > 0:
                            gap = (student.deltas[stride][box] - teacher.deltas[stride][box]).abs().sum().item()
                            l1, foreground = l1 + gap, foreground + 1
    return {"logits.classes": kl / max(1, valid), "logits.boxes": l1 / max(1, foreground)}


class TestDSIG(LossGrid):
    def options(self) -> dict[str, Mapping[str, Any]]:
        return {"logits": {"temperature": 2.0}}

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DSIG(student, teacher, **self.options())

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DSIG(student, teacher, **self.options(), adapter={"kernel": 3})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        graph, logits = slow_graph(student, teacher), slow_regions(student, teacher, 2.0)
        return {"neck.all": slow_neck(student, teacher), **graph, **logits}


class TestDSIGOneStage(TestDSIG):
    student = ONE_STAGE
    teacher = ONE_STAGE

    def options(self) -> dict[str, Mapping[str, Any]]:
        return {**PREDICTED, "logits": {"classes": 1, "boxes": 1, "temperature": 2.0}}

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DSIG(student, teacher, **self.options(), adapter={"kernel": 1, "start": "defeat"})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        terms = {"neck.all": slow_neck(student, teacher), "nodes.predicted": 0.0, "edges.all": 0.0}
        start, images = 0, len(student.batch)
        student_features, teacher_features = student.roi_features([]), teacher.roi_features([])
        for boxes in student.stages["predictions"]:
            rows = range(start, start + len(boxes.boxes))
            start += len(rows)
            mean = sum(slow_node(student_features[row], teacher_features[row]) for row in rows) / max(1, len(rows))
            terms["nodes.predicted"] += 2 / images * mean
            terms["edges.all"] += 2 / images * slow_edges(student_features, teacher_features, rows)
        return {**terms, **slow_anchors(student, teacher, 2.0)}


# -- the graph


def pair(known: DetectorSpec | None = None, dtype: torch.dtype = torch.float64) -> tuple[FakeView, FakeView]:
    known = known or spec()
    return random_view(batch(OBJECTS), known, 1, dtype=dtype), random_view(batch(OBJECTS), known, 2, dtype=dtype)


def grad(view: FakeView) -> FakeView:
    return view.mapped(lambda x: x.clone().requires_grad_())


@pytest.mark.parametrize("label", [0, 1])
def test_an_image_of_one_kind_of_region_adds_nothing_but_stays_attached(label: int) -> None:
    """With and without another image beside it; the reference gives NaN or divides by zero."""
    for other in (0, 1):
        student, teacher = map(grad, pair())
        labels = [torch.full((6,), label), torch.tensor([1, 0, 0, 1, 0, 0]) * other + label * (1 - other)]
        student.stages["rois"] = student.rois._replace(labels=labels)
        values = DSIG(spec(), spec())(student, teacher)
        LossGrid.finite(values)
        expected = slow_graph(student, teacher)
        assert {name: values[name].item() for name in expected} == pytest.approx(expected)
        assert values["nodes.background"].item() == pytest.approx(0) or other
        sum(values.values()).backward()  # type: ignore[union-attr]
        assert student.stages["roi_features"].grad.isfinite().all()


@pytest.mark.parametrize("kept", [0, 1])
def test_edges_run_over_the_foreground_and_what_was_mined_be_it_one_or_none(kept: int) -> None:
    student, teacher = pair()
    logits = torch.zeros(12, 5, dtype=torch.float64)
    logits[:, 0] = 20  # the teacher is sure of background
    logits[1 : 1 + kept, 0] = -20
    teacher.stages["roi_logits"] = logits, teacher.roi_logits([])[1]
    edges = DSIG(spec(), spec(), **only(edges={"all": 1}))(student, teacher)["edges.all"].item()
    student_features, teacher_features = student.roi_features([]), teacher.roi_features([])
    nodes = [[0, 3, *range(1, 1 + kept)], [6, 9]]
    assert edges == pytest.approx(
        sum(slow_edges(student_features, teacher_features, image_nodes) for image_nodes in nodes)
    )


def test_edges_do_not_care_for_the_size_of_features_and_nodes_do() -> None:
    student, teacher = pair()
    terms = only(nodes={"foreground": 1}, edges={"all": 1})
    before = DSIG(spec(), spec(), **terms)(student, teacher)
    student.stages["roi_features"] = 3 * student.stages["roi_features"]
    after = DSIG(spec(), spec(), **terms)(student, teacher)
    assert after["edges.all"].item() == pytest.approx(before["edges.all"].item())
    assert after["nodes.foreground"].item() > 2 * before["nodes.foreground"].item()


def test_nothing_links_images() -> None:
    """Regions of one image that look like those of the other change no edge."""
    student, teacher = map(grad, pair())
    value = DSIG(spec(), spec(), **only(edges={"all": 1}))(student, teacher)["edges.all"]
    student_features, teacher_features = student.roi_features([]), teacher.roi_features([])
    first = replace(student.batch, targets=student.batch.targets[:1], ids=student.batch.ids[:1])
    parts = []
    for rows in (slice(0, 6), slice(6, 12)):
        labels = student.rois.labels[rows.start // 6]
        regions = Regions([torch.zeros(6, 4)], [labels], [], [])
        logits = tuple(x[rows] for x in teacher.roi_logits([]))
        alone = FakeView(first, spec(), rois=regions, roi_features=student_features[rows])
        teacher_alone = FakeView(first, spec(), roi_features=teacher_features[rows], roi_logits=logits)
        parts.append(DSIG(spec(), spec(), **only(edges={"all": 1}))(alone, teacher_alone)["edges.all"])
    assert value.item() == pytest.approx((parts[0] + parts[1]).item() / 2)


class Counting(FakeView):
    """Remembers which boxes were pooled, and the thresholds of predictions."""

    def roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        self.__dict__.setdefault("pooled", []).append(boxes)
        return super().roi_features(boxes)

    def predictions(self, score: float | None = None, nms: float | None = None, top: int | None = None) -> Any:
        self.__dict__.setdefault("asked", []).append((score, nms, top))
        return super().predictions()


def counting(view: FakeView) -> Counting:
    return Counting(view.batch, view.spec, **view.stages)


def test_both_models_pool_the_student_s_regions_once() -> None:
    student, teacher = map(counting, pair())
    DSIG(spec(), spec())(student, teacher)
    assert len(student.__dict__["pooled"]) == len(teacher.__dict__["pooled"]) == 1
    assert student.__dict__["pooled"][0] is teacher.__dict__["pooled"][0] is student.stages["rois"].boxes
    assert "rois" not in teacher.reads


def test_a_one_stage_student_s_predictions_are_pooled_once_without_gradient() -> None:
    student, teacher = map(counting, pair(ONE_STAGE))
    predictions = student.stages["predictions"]
    student.stages["predictions"] = [
        detections._replace(boxes=detections.boxes.clone().requires_grad_()) for detections in predictions
    ]
    DSIG(ONE_STAGE, ONE_STAGE, **PREDICTED)(student, teacher)
    assert len(student.__dict__["pooled"]) == len(teacher.__dict__["pooled"]) == 1
    assert student.__dict__["pooled"][0] is teacher.__dict__["pooled"][0]
    assert not any(boxes.requires_grad for boxes in student.__dict__["pooled"][0])
    assert student.__dict__["asked"] == [(0.0, 0.5, 100)]
    assert "predictions" not in teacher.reads
    thresholds = {"score": 0.1, "nms": 0.7, "top": 3}
    DSIG(ONE_STAGE, ONE_STAGE, **PREDICTED, predictions=thresholds)(student, teacher)
    assert student.__dict__["asked"][1] == (0.1, 0.7, 3)


# -- what is read and built


@pytest.mark.parametrize(
    ("known", "options", "student_reads", "teacher_reads"),
    [
        (spec(), only(neck={"all": 1}), {"neck"}, {"neck"}),
        (spec(), only(nodes={"background": 1}), {"rois", "roi_features"}, {"roi_features"}),
        (spec(), only(edges={"all": 1}), {"rois", "roi_features"}, {"roi_features", "roi_logits"}),
        (spec(), only(edges={"all": 1, "mining": None}), {"rois", "roi_features"}, {"roi_features"}),
        (spec(), only(logits={"boxes": 1}), {"rois", "roi_logits"}, {"roi_logits"}),
        (ONE_STAGE, only(nodes={"predicted": 1}), {"predictions", "roi_features"}, {"roi_features"}),
        (
            ONE_STAGE,
            only(logits={"classes": 1}),
            {"anchor_targets", "class_logits"},
            {"class_logits"},
        ),
        (ONE_STAGE, only(logits={"boxes": 1}), {"anchor_targets", "deltas"}, {"deltas"}),
    ],
)
def test_only_what_a_term_needs_is_read(
    known: DetectorSpec, options: dict[str, Mapping[str, Any]], student_reads: set[str], teacher_reads: set[str]
) -> None:
    student, teacher = pair(known)
    loss = DSIG(known, known, **options)
    assert loss(student, teacher).keys() == loss.weights.keys()
    assert len(loss.weights) == 1
    assert (student.reads, teacher.reads) == (student_reads, teacher_reads)
    assert not list(loss.parameters())


def test_without_weights_there_is_nothing() -> None:
    loss = DSIG(spec(), spec(), **only(), adapter={"kernel": 3})
    assert loss(*pair()) == {}
    assert not list(loss.parameters())


@pytest.mark.parametrize("kernel", [1, 3, "auto"])
@pytest.mark.parametrize("two_stage", [True, False])
def test_unequal_channels_meet_by_adapters_of_neck_and_nodes(kernel: int | str, two_stage: bool) -> None:
    thin, wide = spec(neck=6, two_stage=two_stage), spec(neck=9, two_stage=two_stage)
    student = grad(random_view(batch(OBJECTS), thin, 1, dtype=torch.float32))
    teacher = random_view(batch(OBJECTS), wide, 2, dtype=torch.float32)
    options = {} if two_stage else PREDICTED
    loss = DSIG(thin, wide, **options, adapter={"kernel": kernel})
    LossGrid.finite(loss(student, teacher))
    assert sorted(name for name, _ in loss.named_parameters() if "weight" in name) == [
        *sorted(f"maps.adapters.{stride}.weight" for stride in (4, 8, 16, 32, 64)),
        "regions.weight",
    ]
    side = 1 if kernel == "auto" else kernel
    assert loss.get_parameter("regions.weight").shape == (9, 6, side, side)
    with pytest.raises(DistillError, match="the student has 6 channels and the teacher 9"):
        DSIG(thin, wide, **options, adapter={"kernel": None})


@pytest.mark.parametrize("neck", [6, 9])
def test_the_default_adapter_is_none_for_equal_channels_and_of_kernel_1_otherwise(neck: int) -> None:
    thin, other = spec(neck=6), spec(neck=neck)
    student = random_view(batch(OBJECTS), thin, 1, dtype=torch.float32)
    teacher = random_view(batch(OBJECTS), other, 2, dtype=torch.float32)
    losses = DSIG(thin, other), DSIG(thin, other, adapter={"kernel": None if neck == 6 else 1})
    default, explicit = (dict(loss.named_parameters()) for loss in losses)
    assert bool(default) == (neck != 6)
    assert default.keys() == explicit.keys()
    values, expected = (loss(student, teacher) for loss in losses)
    assert all(torch.equal(values[term], expected[term]) for term in losses[1].weights)


def test_the_loss_falls_when_only_it_is_minimised() -> None:
    for known, options in ((spec(), {}), (ONE_STAGE, PREDICTED)):
        student, teacher = pair(known, torch.float32)
        student = grad(student)
        loss = DSIG(known, known, **options, adapter={"kernel": 1})
        optimizer = torch.optim.SGD([*student.leaves(), *loss.parameters()], lr=0.05)
        totals = []
        for _ in range(20):
            values = loss(student, teacher)
            total = sum((loss.weights[name] * value for name, value in values.items()), start=torch.zeros(()))
            totals.append({**{name: value.item() for name, value in values.items()}, "total": total.item()})
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        assert all(totals[-1][name] < totals[0][name] for name in totals[0])


# -- heads


def test_a_teacher_with_more_classes_is_read_in_the_student_s_columns() -> None:
    student_spec, teacher_spec = spec(classes=("dog", "cat")), spec(classes=("cat", "cow", "dog", "hen"))
    student, teacher = random_view(batch(OBJECTS), student_spec, 1), random_view(batch(OBJECTS), teacher_spec, 2)
    student.stages["rois"] = student.rois._replace(labels=[torch.tensor([1, 2, 0, 2, 0, 0])] * 2)
    columns = torch.tensor([0, 3, 1])
    logits, deltas = teacher.roi_logits([])
    known = deltas.view(12, 5, 4)[:, columns].flatten(1)
    same = FakeView(teacher.batch, student_spec, **{**teacher.stages, "roi_logits": (logits[:, columns], known)})
    loss = DSIG(student_spec, teacher_spec)
    assert not loss.state_dict()
    expected = {**slow_graph(student, same), **slow_regions(student, same, 1)}
    values = {name: value.item() for name, value in loss(student, teacher).items()}
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_a_one_stage_teacher_with_more_classes_likewise() -> None:
    student_spec = spec(classes=("dog", "cat"), two_stage=False)
    teacher_spec = spec(classes=("cat", "cow", "dog", "hen"), two_stage=False)
    student, teacher = random_view(batch(OBJECTS), student_spec, 1), random_view(batch(OBJECTS), teacher_spec, 2)
    narrow = {s: x.unflatten(1, (3, 4))[:, :, [2, 0]].flatten(1, 2) for s, x in teacher.class_logits.items()}
    same = FakeView(teacher.batch, student_spec, **{**teacher.stages, "class_logits": narrow})
    values = DSIG(student_spec, teacher_spec, **PREDICTED)(student, teacher)
    expected = slow_anchors(student, same, 1)
    assert {name: values[name].item() for name in expected} == pytest.approx(expected)


# -- refusals, all at construction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": {"foregrund": 3}}, "nodes: unknown option 'foregrund'.*did you mean 'foreground'"),
        ({"edges": {"mine": 3}}, "edges: unknown option 'mine'.*did you mean 'mining'"),
        ({"nodes": {"alpha": -1}}, "nodes.alpha: expected a number, 0 or more, or null, got -1"),
        ({"edges": {"mining": "hard"}}, "edges.mining: expected a number"),
        ({"edges": {"mining": math.nan}}, "edges.mining: expected a number"),
        ({"edges": {"all": -2}}, "DSIG: expected weights"),
        ({"logits": {"temperature": 0}}, "logits.temperature: expected a number above 0"),
        ({"predictions": {"nms": 2}}, "predictions: expected"),
        ({"predictions": {"top": 0}}, "predictions: expected"),
        ({"predictions": {"score": None}}, "predictions: expected"),
        ({"neck": {"levels": [4, 128]}}, r"neck.levels: .* got \[4, 128\]"),
        ({"adapter": {"kernel": 5}}, "adapter: expected a kernel"),
        ({"adapter": {"relu": True}}, r"adapter: a ReLU follows a convolution, .* Set adapter.kernel=1 or 3"),
        ({"normalizer": "batch"}, "global or process"),
        ({"ramp": {"shape": "up"}}, "ramp.shape"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        DSIG(spec(), spec(), **options)


def test_settings_of_the_other_family_name_the_option_to_choose() -> None:
    choose = (
        "Choose distill=dsig_retinanet or dsig_retinanet_small, "
        "or set nodes.foreground=0, nodes.background=0, edges.mining=null"
    )
    with pytest.raises(DistillError, match=choose):
        DSIG(ONE_STAGE, ONE_STAGE)
    with pytest.raises(DistillError, match=r"the student is a retinanet.*or set nodes.background=0$"):
        DSIG(ONE_STAGE, ONE_STAGE, **{**PREDICTED, "nodes": {"foreground": 0}})
    with pytest.raises(DistillError, match=r"the student is a retinanet.*or set edges.mining=null$"):
        DSIG(ONE_STAGE, ONE_STAGE, **{**PREDICTED, "edges": {"all": 1}})
    queries = replace(query_spec(), outputs=query_spec().outputs | {"roi_features"})
    nodes = "whose nodes are its predicted regions, but the settings are for foreground and background regions. "
    with pytest.raises(DistillError, match=f"{nodes}Choose distill=dsig_retinanet_small, or set"):
        DSIG(queries, queries)  # dsig_retinanet does not fit either: its term on logits needs anchors
    choose = "Choose distill=dsig, dsig_r50_r101 or dsig_r101_r152, or set nodes.predicted=0"
    with pytest.raises(DistillError, match=choose):
        DSIG(spec(), spec(), **PREDICTED)
    DSIG(ONE_STAGE, ONE_STAGE, **only(neck={"all": 1}))  # without edges nothing is mined


def test_heads_that_do_not_match_are_refused() -> None:
    for student, teacher, options in ((spec(), ONE_STAGE, {}), (ONE_STAGE, spec(), PREDICTED)):
        with pytest.raises(DistillError, match=r"DSIG: to compare their heads.*logits.classes=0, logits.boxes=0"):
            DSIG(student, teacher, **options)
    with pytest.raises(DistillError, match=r"or set edges.mining=null$"):
        DSIG(spec(), ONE_STAGE, **only(edges={"all": 1}))
    with pytest.raises(DistillError, match=r"\{4: 3.*\{4: 2"):
        DSIG(ONE_STAGE, spec(two_stage=False, anchors=2), **PREDICTED)
    with pytest.raises(DistillError, match=r"a fcos with"):
        DSIG(ONE_STAGE, replace(ONE_STAGE, family="fcos"), **PREDICTED)
    with pytest.raises(DistillError, match=r"\['cow'\] of"):
        DSIG(spec(classes=("cow", "cat")), spec(classes=("cat", "Cow")))
    single = spec(classes=("cow",), two_stage=False)
    with pytest.raises(DistillError, match=r"is constant with only one class.*Set logits.classes=0"):
        DSIG(single, single, **PREDICTED)


def test_a_graph_alone_may_cross_families() -> None:
    """The teacher needs no regions of its own for it, and no classes."""
    graph = {**PREDICTED, "logits": {"classes": 0, "boxes": 0}}
    strangers = spec(classes=("bus",))
    for student, teacher, options in (
        (ONE_STAGE, strangers, graph),
        (
            spec(),
            spec(classes=("bus",), two_stage=False),
            only(nodes={"background": 1}, edges={"all": 1, "mining": None}),
        ),
    ):
        student_view, teacher_view = random_view(batch(OBJECTS), student, 1), random_view(batch(OBJECTS), teacher, 2)
        LossGrid.finite(DSIG(student, teacher, **options)(grad(student_view), teacher_view))


@pytest.mark.parametrize(
    ("known", "options", "stage"),
    [
        (spec(), only(nodes={"foreground": 1}), "roi_features"),
        (spec(), only(edges={"all": 1}), "roi_features"),
        (spec(), only(logits={"classes": 1}), "roi_logits"),
        (ONE_STAGE, only(logits={"classes": 1}), "class_logits"),
        (ONE_STAGE, only(logits={"boxes": 1}), "deltas"),
    ],
)
def test_each_place_refuses_a_wrong_shape(
    known: DetectorSpec, options: dict[str, Mapping[str, Any]], stage: str
) -> None:
    student, teacher = pair(known)
    wrong = student.mapped(lambda x: x[:-1])
    student.stages[stage] = wrong.stages[stage]
    with pytest.raises(DistillError, match="expected student and teacher of equal shape"):
        DSIG(known, known, **options)(student, teacher)


# -- several processes


KEPT = (6, 4, 3, 1)  # regions of the four images: as many in no two of them


def part_of(view: FakeView, rows: slice) -> FakeView:
    """Some images of a view, each with its first regions."""
    images, numbers = view.batch, range(len(view.batch))[rows]
    cut = [6 * image + region for image in numbers for region in range(KEPT[image])]

    def first(values: Sequence[Any]) -> list[Any]:
        return [values[image][: KEPT[image]] for image in numbers]

    stages: dict[str, Any] = {
        "roi_features": view.stages["roi_features"][cut],
        "roi_logits": tuple(x[cut] for x in view.stages["roi_logits"]),
        "rois": Regions(*map(first, view.stages["rois"])),
        "anchors": view.stages["anchors"],
        "predictions": [Detections(*(x[: KEPT[i]] for x in view.stages["predictions"][i][:3])) for i in numbers],
        "anchor_targets": AnchorTargets(*(x[rows] for x in view.stages["anchor_targets"])),
    }
    for name in {"neck", "deltas", "class_logits"} & view.stages.keys():
        stages[name] = {stride: x[rows] for stride, x in view.stages[name].items()}
    part = replace(images, targets=images.targets[rows], ids=images.ids[rows], sizes=images.sizes[rows])
    return FakeView(part, view.spec, **stages)


CASES: list[tuple[DetectorSpec, dict[str, Mapping[str, Any]]]] = [(spec(), {}), (ONE_STAGE, PREDICTED)]


def gradients(rows: slice, normalizer: str, known: DetectorSpec, options: dict[str, Mapping[str, Any]]) -> list[Tensor]:
    """Gradients of all terms by the adapters and by a factor on the student's outputs; no adapter follows the heads."""
    images = batch([OBJECTS[0], OBJECTS[1], NOTHING, NOTHING])
    student, teacher = (part_of(random_view(images, known, seed), rows) for seed in (1, 2))
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = DSIG(known, known, **options, adapter={"kernel": 1}, normalizer=normalizer).double()
    moved = [*loss.parameters(), factor]
    values = loss(student.mapped(lambda x: factor * x), teacher).values()
    gradients_of_terms = [
        torch.autograd.grad(value, moved, retain_graph=True, materialize_grads=True) for value in values
    ]
    return [torch.cat([value.flatten() for value in term]) for term in gradients_of_terms]


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for number, case in enumerate(CASES):
        for normalizer in base.NORMALIZERS:
            shared = gradients(slice(2 * rank, 2 * rank + 2), normalizer, *case)
            for gradient in shared:
                dist.all_reduce(gradient)
            if rank == 0:
                torch.save([gradient / 2 for gradient in shared], f"{folder}/{normalizer}{number}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Two images each, those of the second process without boxes; gradients averaged as DDP does."""
    run_in_two_processes(one_rank, str(tmp_path))
    for number, case in enumerate(CASES):
        whole = gradients(slice(0, 4), "global", *case)
        shared = torch.load(tmp_path / f"global{number}.pt")
        assert len(shared) == len(whole) == (6, 5)[number]
        for gradient, expected in zip(shared, whole, strict=True):
            assert expected.abs().sum() > 0
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)
        apart = torch.load(tmp_path / f"process{number}.pt")
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(apart, whole, strict=True))
