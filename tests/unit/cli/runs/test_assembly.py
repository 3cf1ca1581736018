"""One plan and one assembly for train, doctor, bench and replay."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from distill.cli.config import override_checks
from distill.cli.runs import assembly, teacher_cache
from distill.cli.runs.assembly import assemble, build_student
from distill.cli.runs.preflight import RunPlan, plan_run
from distill.data.datamodule import DetectionData
from distill.teacher import Teacher
from distill.types import DistillError
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL

LINES = [*TINY_DATA, *TINY_MODEL, *TINY_HEADS, "model=frcnn_r10_mini", "teacher=frcnn_r18_mini", "data.workers=0"]


def plan(*lines: str) -> RunPlan:
    return plan_run(override_checks.compose_without_run([*LINES, *lines]))


def untrained_teacher(run: RunPlan) -> Teacher:
    assert run.teacher is not None
    return teacher_cache.as_teacher(
        run.teacher, teacher_cache.untrained(run.teacher, run.data.classes), teacher_cache.UNTRAINED
    )


def test_weights_of_the_plan_reach_the_step() -> None:
    run = plan("supervised.loss_objectness=0.25", "distill=defeat", "distill.losses.defeat.ramp.shape=linear")
    module = assemble(run, run.data, teacher=untrained_teacher(run))
    batch = next(iter(run.data.train_dataloader()))
    step = module.compute_step(batch, seed=0, progress=0.5)
    assert step.weights["student/loss_objectness"] == 0.25
    assert step.weights["student/loss_classifier"] == 1.0
    loss = module.losses["defeat"]
    for name, weight in loss.weights.items():
        assert step.weights[f"defeat/{name}"] == 0.5 * weight
    expected = sum(step.weights[name] * value for name, value in step.terms.items())
    torch.testing.assert_close(step.loss, expected)


def test_objects_that_are_given_are_used() -> None:
    run = plan()
    student, known = build_student(run, run.data), untrained_teacher(run)
    module = assemble(run, run.data, student, known)
    assert module.student is student
    assert module.teacher is known
    alone = assemble(replace(run, losses={}), run.data, student, known)
    assert alone.teacher is None
    assert not alone.losses


def test_two_methods_at_one_place_cause_a_warning_unless_asked_for() -> None:
    for words, expected in (
        (["distill=[defeat,ssim]"], ["defeat and ssim compare the same place (neck)"]),
        (["distill=[defeat,ssim]", "distill.same_place=allow"], []),
        (["distill=[defeat,dist]"], []),
        (["distill=[defeat,ssim]", "distill.losses.ssim.neck.foreground=0"], []),
    ):
        run = plan(*words)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assemble(run, run.data, teacher=untrained_teacher(run))
        messages = [str(warning.message) for warning in caught if "same place" in str(warning.message)]
        assert [message.partition("distill: ")[2].partition(",")[0] for message in messages] == expected


def test_a_balance_is_that_of_the_configuration() -> None:
    assert plan("distill=defeat").balance is None
    assert plan("distill=none", "distill.balance=gradient").balance is None
    balance = plan("distill=defeat", "distill.balance=gradient", "distill.balance_share={defeat: 0.2}").balance
    assert balance is not None
    assert (balance.share, balance.steps) == ({"defeat": 0.2}, 50)
    for word, message in (
        ("distill.balance=much", "distill.balance=much: expected one of none, gradient"),
        ("distill.balance_steps=0", "balance_steps: expected a whole number from 1"),
        ("distill.balance_share={pkd: 1}", "expected a share for each of defeat"),
    ):
        first = [] if "balance=" in word else ["distill.balance=gradient"]
        with pytest.raises(DistillError, match=message):
            plan("distill=defeat", *first, word)


def test_the_assembly_draws_no_random_number_of_its_own() -> None:
    run = plan()
    student, known = build_student(run, run.data), untrained_teacher(run)
    before = torch.random.get_rng_state()
    assemble(run, run.data, student, known)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("lines", [("distill=defeat",), ("distill=none", "init=inherit")])
def test_a_missing_teacher_is_refused_before_data_is_read(
    lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DetectionData, "records", lambda *_: pytest.fail("data was read"))
    with pytest.raises(DistillError, match="cannot do without a teacher"):
        plan(*lines, "teacher=none")


SMALL_DATA = ["data.source.train=4", "data.source.val=2", "data.source.test=0", "data.batch_size=2", "data.workers=0"]


def query_plan(*lines: str) -> RunPlan:
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    return plan_run(override_checks.compose_without_run([*SMALL_DATA, "distill=pkd", *lines]))


SQUARE_96 = ["data.min_size=96", "data.max_size=96"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model=rtdetr_mini", *SQUARE_96, "data.pad_to=64"], r"data\.pad_to=64.*padded to 128.*data\.pad_to=32"),
        (
            ["model=rfdetr_mini", "model.queries=20", *SQUARE_96, "data.pad_to=64"],
            r"data\.pad_to=64.*padded to 128.*data\.pad_to=32",
        ),
        (["model=rfdetr_mini", "model.windows=4", *SQUARE_96], r"multiples of 64 pixels.*got 96"),
        (
            ["model=rfdetr_mini", "model.windows=4", "data.min_size=96", "data.eval_min_size=128"],
            r"data\.min_size: the student is .*multiple of 64.*squares of 96\. Set data\.min_size .* to 64 or 128",
        ),
        (["model=dfine_mini", "data.min_size=100", "data.eval_min_size=128"], r"data\.min_size: .*Set .* to 96 or 128"),
    ],
)
def test_squares_that_the_student_cannot_take(lines: list[str], message: str) -> None:
    """The first step failed, or the student saw the padding as image."""
    run = query_plan("teacher=frcnn_r18_mini", *lines)
    with pytest.raises(DistillError, match=message):
        build_student(run, run.data)


def test_squares_that_the_teacher_cannot_take_are_refused_before_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "find_teacher", lambda *_: pytest.fail("it would be trained now"))
    four_windows = ["teacher=rfdetr_mini", "teacher.model.windows=4"]
    for student in ("rtdetr_mini", "frcnn_r10_mini"):
        run = query_plan(f"model={student}", *four_windows, *SQUARE_96)
        with pytest.raises(DistillError, match=r"teacher\.model: min_size.*multiples of 64 pixels.*got 96 and 96"):
            assemble(run, run.data)
    few = ["teacher=rfdetr_mini", "teacher.model.queries=20"]
    run = query_plan("model=frcnn_r10_mini", *few, *SQUARE_96, "data.pad_to=64")
    with pytest.raises(DistillError, match=r"data\.pad_to=64.*the teacher, a rfdetr, sees padding as image"):
        assemble(run, run.data)


def test_a_teacher_is_planned_for_the_squares_of_the_run() -> None:
    """Three windows need multiples of 48 pixels. The teacher's own image size is 128."""
    three = ["teacher=rfdetr_mini", "teacher.model.windows=3", "data.min_size=192", "data.max_size=192"]
    run = query_plan("model=rtdetr_mini", *three)
    assert run.teacher is not None
    planned = teacher_cache.planned_teacher(run.teacher, ["cat"])
    assert (planned.options["min_size"], planned.options["max_size"]) == (192, 192)
    few = query_plan("model=frcnn_r10_mini", "teacher=rfdetr_mini", *SQUARE_96)
    assert few.teacher is not None
    with pytest.raises(DistillError, match=r"queries=60: an image of 96 pixels has 36 cells.*teacher\.model\.queries"):
        teacher_cache.planned_teacher(few.teacher, ["cat"])


def test_squares_that_a_loaded_teacher_cannot_take() -> None:
    words = ["model=frcnn_r10_mini", "teacher=rfdetr_mini", "teacher.model.windows=4"]
    teacher, run = untrained_teacher(query_plan(*words)), query_plan(*words, *SQUARE_96)
    with pytest.raises(DistillError, match=r"the teacher is a rfdetr.*multiple of 64 pixels, got squares of 96"):
        assemble(run, run.data, teacher=teacher)


def test_squares_of_any_side_suit_detectors_that_are_used_to_padding() -> None:
    sizes = ["data.resize=square", "data.min_size=100", "data.max_size=100", "data.pad_to=64"]
    run = plan(*sizes, "distill=pkd")
    assert assemble(run, run.data, teacher=untrained_teacher(run)).teacher is not None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["model.input_stride=2"],
            r"student's \[8, 16, 32, 64, 128\] and the teacher's \[4, 8, 16, 32, 64\].*input_st",
        ),
        (["teacher.model.input_stride=2"], r"student's \[4, 8, 16, 32, 64\] and the teacher's \[8, 16, 32, 64, 128\]"),
        (["teacher=retinanet_r18"], r"pyramids of equal strides"),
    ],
)
def test_a_teacher_of_which_nothing_can_be_inherited_is_refused_before_it_is_trained(
    lines: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "find_teacher", lambda *_: pytest.fail("it would be trained now"))
    run = plan("init=inherit", "distill=none", *lines)
    with pytest.raises(DistillError, match=message):
        assemble(run, run.data)


def test_a_student_that_sees_small_images_inherits_from_a_teacher_that_does() -> None:
    neck = "teacher.model.neck_channels=16"
    run = plan("init=inherit", "distill=none", "model.input_stride=2", "teacher.model.input_stride=2", neck)
    teacher = untrained_teacher(run)
    student, given = assemble(run, run.data, teacher=teacher).student.net, teacher.detector.net
    assert student.backbone.body.input_stride == 2
    for name, value in given.rpn.head.state_dict().items():
        assert torch.equal(student.rpn.head.state_dict()[name], value), name
