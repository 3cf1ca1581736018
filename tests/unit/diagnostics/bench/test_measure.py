"""The bench measures what it says: each part on its own, ratios of the same round, nothing trained on the way."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.datamodule import DetectionData
from distill.data.shapes import CLASSES
from distill.diagnostics.bench.clock import Clock, Spread
from distill.diagnostics.bench.measure import (
    _flops,
    _option_cost,
    _teacher_flops,
    measure_loader,
    measure_option,
    measure_student,
    set_norm_statistics,
)
from distill.diagnostics.bench.report import Cost, OptionCost, Report, verdict
from distill.diagnostics.bench.step import StageReads, Step, WatchedView
from distill.diagnostics.memory import Memory
from distill.diagnostics.sampled_evaluation import evaluate_sample
from distill.evaluation.coco import CocoMetric
from distill.losses.defeat import DeFeat
from distill.losses.dicod import DICOD
from distill.losses.mimic import Mimic
from distill.teacher import Teacher
from distill.training.distiller import Distiller
from distill.types import Batch, DistillError
from helpers.bench_detector import CPU, detector
from helpers.loss_states import RandomClassifier


def step(batch: Batch, kind: Any = DeFeat, **options: Any) -> Step:
    student, teacher = detector(), Teacher(detector(1, neck_channels=24))
    losses = {"loss": kind(student.spec, teacher.spec, **options)} if kind else {}
    return Step(Distiller(student, teacher, losses), batch)


class SetClock(Clock):
    """Every span lasts as long as the next number says."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(CPU)
        self.numbers = list(numbers)

    def time(self, run: Any) -> float:
        run()
        return self.numbers.pop(0)


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_the_clock_of_the_processor_does_not_count_waiting() -> None:
    wall, cpu = Clock(CPU, "wall"), Clock(CPU, "cpu")
    assert wall.time(lambda: time.sleep(0.2)) >= 0.2
    assert cpu.time(lambda: time.sleep(0.2)) < 0.15
    with pytest.raises(DistillError, match="expected one of wall, cpu, got 'sun'"):
        Clock(CPU, "sun")


class Slow:
    """A view whose stages take their time."""

    @property
    def neck(self) -> dict[int, Tensor]:
        time.sleep(0.05)
        return {8: torch.ones(1)}

    def roi_features(self, boxes: list[Tensor], scale: int = 1) -> Tensor:
        time.sleep(0.1)
        return boxes[0] * scale


def test_a_watched_view_clocks_what_is_read_and_hands_it_on() -> None:
    clock = Clock(CPU)
    read = StageReads()
    watched = WatchedView(Slow(), clock.mark, read)  # type: ignore[arg-type]
    assert watched.neck[8] == 1
    assert watched.roi_features([torch.tensor(2.0)], scale=3) == 6
    time.sleep(0.2)
    assert watched.neck[8] == 1
    assert read.stages == ["neck", "roi_features"]
    assert 0.2 <= clock.seconds(*read.spans) < 0.35


def test_a_step_computes_every_gradient_and_changes_no_weight(batch: Batch) -> None:
    made = step(batch)
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    made.run()
    assert all(p.grad is not None for p in (*made.student.parameters(), *made.losses.parameters()))
    assert all(torch.equal(p, before[name]) for name, p in made.student.named_parameters())


def test_a_step_sums_weighted_terms(batch: Batch) -> None:
    made = step(batch, neck={"foreground": 3.0, "background": 0.5})
    assert made.teacher is not None
    student = made.student.view(batch, seed=0)
    terms = made.losses["loss"](student, made.teacher.view(batch, seed=1))
    expected = 3.0 * terms["neck.foreground"] + 0.5 * terms["neck.background"]
    torch.testing.assert_close(made.distilled(student, made.teacher.view(batch, seed=1)), expected)


def test_a_step_is_that_of_training_with_its_weights_and_ramps(batch: Batch) -> None:
    student, teacher = detector(), Teacher(detector(1, neck_channels=24))
    loss = DeFeat(student.spec, teacher.spec, ramp={"shape": "linear"})
    made = Step(Distiller(student, teacher, {"defeat": loss}, supervised={"loss_objectness": 0.25}), batch)
    own, view = made.student_view(), made.teacher_view()
    torch.testing.assert_close(
        made.supervised(own), sum(own.losses.values(), start=torch.zeros(())) - 0.75 * own.losses["loss_objectness"]
    )
    terms = loss(own, view)
    assert len(terms) == 2
    torch.testing.assert_close(
        made.distilled(own, view), sum(0.5 * loss.weights[name] * value for name, value in terms.items())
    )
    step = made.module.compute_step(batch, seed=0, progress=0.5)
    torch.testing.assert_close(step.loss, made.supervised(own) + made.distilled(own, view))


def test_the_teacher_is_clocked_as_deep_as_the_losses_read(batch: Batch) -> None:
    neck, ours = step(batch).record_reads()
    regions, _ = step(batch, Mimic).record_reads()
    assert neck.stages == ["neck"]
    assert "neck" in ours.stages
    assert regions.stages == ["roi_features"]
    assert step(batch, None).record_reads() == (StageReads(), StageReads())


def test_adapters_run_on_what_they_see_in_a_step_and_leave_nothing(batch: Batch) -> None:
    made = step(batch)
    seen: list[tuple[int, ...]] = []
    replay = made.adapter_passes()
    for layer in made.losses.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    replay()
    assert seen == [(2, 24, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32, 64)]
    assert all(p.grad is None for p in (*made.losses.parameters(), *made.student.parameters()))


def test_layers_that_run_again_are_the_students_head_on_the_teachers_regions(batch: Batch) -> None:
    """And nothing, for losses that read only what the student's own step has."""
    made = step(batch, proposals={"positive": 1.0, "negative": 1.0})
    seen: list[tuple[str, int]] = []
    replay = made.recompute_passes()
    for name, layer in made.student.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            layer.register_forward_hook(lambda _, inputs, output, name=name: seen.append((name, len(output))))
    replay()
    teacher: Any = made.teacher
    regions = sum(map(len, teacher.view(batch, seed=1).rois.boxes))
    layers = ("box_head.fc6", "box_head.fc7", "box_predictor.cls_score", "box_predictor.bbox_pred")
    assert seen == [(f"net.roi_heads.{name}", regions) for name in layers]
    assert all(p.grad is None for p in made.student.parameters())
    assert step(batch, Mimic).recompute_passes() is step(batch).recompute_passes()


def test_ratios_are_those_of_the_same_round(batch: Batch) -> None:
    times = [2.0, 4.0, 2.0], [4.0, 10.0, 3.0], [1.0, 1.0, 0.5], [0.25, 0.5, 0.125], [0.25, 0.5, 0.125]
    alone, made = step(batch, None), step(batch)
    cost = _option_cost(alone, made, (["neck"], []), *times)
    assert cost.ratio.median == 2.0
    assert cost.teacher_ratio == Spread(0.25, 0.25, 0.5)
    assert cost.adapters_ratio.median == cost.student_recompute_ratio.median == 0.125
    assert cost.loss_overhead.median == pytest.approx(4 / 3.5 - 1)
    assert (cost.loss_overhead.low, cost.loss_overhead.high) == (pytest.approx(3 / 2.75 - 1), pytest.approx(10 / 6 - 1))
    assert cost.allowed == 0.03
    assert _option_cost(alone, made, (["neck", "roi_features"], []), *times).allowed == 0.10
    assert _option_cost(alone, made, ([], ["neck", "rois"]), *times).allowed == 0.10


def test_a_round_takes_every_part_once_and_the_first_ones_are_thrown_away(batch: Batch) -> None:
    clock = SetClock(
        *(9, 9, 9, 9), *(1, 4, 0.5, 0), *(2, 4, 0.5, 0)
    )  # a warm-up; then student, step, adapters and recompute, twice
    plain = step(batch, None)
    cost = measure_option(plain, step(batch), clock, repeats=2, warmup=1)
    assert not clock.numbers
    assert (cost.step.median, cost.adapters.median, cost.ratio.median) == (4, 0.5, 3)
    student = measure_student(plain, SetClock(9, 1, 2), repeats=2, warmup=1)
    assert student.step.median == 1.5
    adapters = sum(3 * 2 * 2 * 16 * 24 * 9 * (64 // stride) ** 2 for stride in (4, 8, 16, 32, 64))
    boxes = max(len(target.boxes) for target in batch.targets)
    masks = 2 * 2 * boxes * sum((64 // stride) ** 2 for stride in (4, 8, 16, 32, 64))  # unions by matrix products
    rest = cost.flops - student.flops - cost.teacher_flops - adapters
    assert 0 < rest <= 2 * masks


def test_flops_are_those_of_the_layers() -> None:
    layer, x = nn.Linear(5, 7, bias=False), torch.ones(3, 5)
    assert _flops(lambda: layer(x)) == 2 * 3 * 5 * 7


def test_loader_and_evaluation_are_measured(data: DetectionData) -> None:
    found = measure_loader(data, batches=7)  # more than an epoch has
    assert found["images_per_second"] > 0 == found["workers"]
    model = detector()
    model.train()
    taken = evaluate_sample(model, data, [CocoMetric], CPU, limit=3)
    assert taken["images"] == 3
    assert taken["detect"] > 0 < taken["metric"]
    assert model.training


def test_settling_gives_live_norms_the_statistics_of_the_batch(batch: Batch) -> None:
    model = detector()
    first: Any = model.net.backbone.body.bn1
    momentum = first.momentum
    set_norm_statistics(model, batch)
    with torch.no_grad():
        images = model.view(batch, training=False, frozen=True).images  # type: ignore[attr-defined]
        stem = model.net.backbone.body.conv1(images)
    torch.testing.assert_close(first.running_mean, stem.mean((0, 2, 3)))
    assert first.momentum == momentum
    assert not model.training


def spread(value: float) -> Spread:
    return Spread(value, value, value)


def report(
    loader: float = 1000.0,
    loss_overhead: float = 0.01,
    teacher: float = 0.4,
    adapters: float = 0.1,
    recompute: float = 0.0,
) -> Report:
    option = OptionCost(
        *(spread(0.2), 2.0, {}, spread(0.1), spread(0.1 * teacher), spread(0.1 * adapters), spread(0.1 * recompute)),
        *(
            spread(2.0),
            spread(teacher),
            spread(adapters),
            spread(recompute),
            spread(loss_overhead),
            1.0,
            ["neck"],
            0.03,
        ),
        bytes=Memory(4.0, 3.0, 2.0, 1.0, 9.0, 0.0),
    )
    return Report({}, Cost(spread(0.1), 1.0, {}), {"x": option}, {}, {"images_per_second": loader}, {})


def test_the_verdict_names_the_bottleneck_and_a_remedy() -> None:
    assert "student's own step is the bottleneck, 50 %" in verdict(report(), 4)[0]
    assert "teacher's forward pass is the bottleneck, 70 %" in verdict(report(teacher=1.4), 4)[0]
    assert "of the adapters is the bottleneck, 60 %" in verdict(report(adapters=1.2), 4)[0]
    assert "which the losses recompute, is the bottleneck, 75 %" in verdict(report(recompute=1.5), 4)[0]
    assert len(verdict(report(), 4)) == 1
    slow = verdict(report(loader=30.0), 4)  # the student eats 40 a second, with x 20
    assert slow[0].startswith(
        "student alone: the loader is the bottleneck, with 30.0 images/s where the step could take 40"
    )
    assert slow[1].startswith("x: the student's own step")
    assert "x: losses and masks take 8.0 %" in verdict(report(loss_overhead=0.08), 4)[1]


def test_the_verdict_tells_a_teachers_maps_from_what_a_loss_keeps() -> None:
    found = report()
    for bytes_, words in (
        (Memory(4.0, 3.0, 2.0, 1.0, 11.0, 1.0), "1.10 times the sum of its parts: the teacher's maps"),
        (Memory(4.0, 3.0, 2.0, 1.0, 11.0, 2.0), "are kept until then: does a loss keep a View"),
    ):
        found.options["x"].bytes = bytes_
        assert words in verdict(found, 4)[1]


def test_a_guest_of_a_loss_is_clocked_as_a_teacher(batch: Batch) -> None:
    student, classifier = detector(), RandomClassifier(("background", *CLASSES))
    loss = DICOD(student.spec, None, classifier, size=12)
    made = Step(Distiller(student, None, {"dicod": loss}), batch)
    theirs, ours = made.record_reads()
    assert {"images", "logits"} <= set(theirs.stages)
    assert {"rois", "roi_logits"} <= set(ours.stages)
    assert loss.classifier is classifier
    assert {id(each.untyped_storage()) for each in classifier.net.parameters()} == {
        id(each.untyped_storage()) for each in made.teacher_tensors()
    }
    stages = _teacher_flops(made)
    crops = sum(len(target.boxes) for target in batch.targets)
    assert stages >= 2 * 12 * (len(CLASSES) + 1) * crops  # its last layer, of each object once


def test_guests_are_put_back_when_a_loss_fails(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    student, classifier = detector(), RandomClassifier()  # knows none of the classes
    loss = DICOD(student.spec, None, classifier, {"classes": 0}, size=12)
    made, met = Step(Distiller(student, None, {"dicod": loss}), batch), []

    def broken(self: DICOD, *_: Any) -> Any:
        met.append(self.classifier)
        raise ZeroDivisionError

    monkeypatch.setattr(DICOD, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        made.record_reads()
    assert met != [classifier]  # it was watched
    assert loss.classifier is classifier
