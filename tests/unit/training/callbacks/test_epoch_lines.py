"""The lines of a run on the terminal: a line per epoch, and the estimate of the duration."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.losses.defeat import DeFeat
from distill.training.callbacks.epoch_lines import EpochLines, Pace, describe_metric, remaining_work, validation_images
from distill.training.callbacks.history import History
from distill.types import DistillError
from helpers.training import distiller, fit

ROWS = [{"epoch": 1, "val/AP": 0.2511}, {"epoch": 2}, {"epoch": 3, "val/AP": 0.1234}]


def test_a_line_per_epoch_and_an_estimate_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = EpochLines("teacher", estimate_steps=1)
    module = distiller(losses={"defeat": DeFeat})
    fit(module, tmp_path, max_epochs=2, limit_val_batches=1.0, callbacks=[History(tmp_path), lines])
    estimate, first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"teacher time  about [\d.]+ s left, until \d\d:\d\d: 2 steps of [\d.]+ s and [\d.]+ s of evaluation on CPU",
        estimate,
    )
    line = r"loss (\S+) \(detection (\S+), distillation (\S+)\)  AP \S+, best \S+ in epoch \d  \S+ s( .*)?"
    losses = re.fullmatch(f"teacher epoch 1/2  {line}", first)
    assert losses
    total, detection, distillation = map(float, losses.groups()[:3])
    assert total == pytest.approx(detection + distillation, abs=0.002)
    assert re.fullmatch(f"teacher epoch 2/2  {line}", second)


def test_the_estimate_comes_before_the_first_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning counts the validation batches at the first evaluation. Before it, all images are left."""
    lines = EpochLines(estimate_steps=1)
    trainer = fit(
        distiller(), tmp_path, max_epochs=2, limit_val_batches=1.0, check_val_every_n_epoch=2, callbacks=[lines]
    )
    assert re.search(r"2 steps of [\d.]+ s and [\d.]+ s of evaluation", capsys.readouterr().out)
    assert validation_images(trainer) == len(trainer.datamodule.records("val"))


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 10), (2, 4), (0.5, 4)])
def test_the_images_of_an_evaluation_that_has_not_begun(limit: float, expected: int) -> None:
    """Ten images in batches of two: five batches, of which Lightning rounds a fraction down."""
    data = SimpleNamespace(records=lambda split: range(10), eval_batch_size=2)
    trainer: Any = SimpleNamespace(num_val_batches=[], limit_val_batches=limit, world_size=1, datamodule=data)
    assert validation_images(trainer) == expected


def test_the_metric_is_percent_with_its_best_epoch() -> None:
    assert describe_metric(ROWS, "val/AP") == "AP 12.3, best 25.1 in epoch 1"
    assert describe_metric(ROWS[:2], "val/AP") == "best 25.1 in epoch 1"
    assert describe_metric(ROWS[1:2], "val/AP") == ""
    assert describe_metric([{"epoch": 1, "val/AP": -1.0}], "val/AP") == ""


@pytest.mark.parametrize(
    ("done", "every", "expected"),
    [(0, 1, (100, 10)), (20, 1, (80, 8)), (21, 1, (79, 8)), (20, 4, (80, 3)), (100, 4, (0, 0))],
)
def test_the_work_that_is_left(done: int, every: int, expected: tuple[float, int]) -> None:
    """Ten epochs of ten steps; the last one is always evaluated."""
    trainer: Any = SimpleNamespace(
        estimated_stepping_batches=100,
        global_step=done,
        num_training_batches=20,
        accumulate_grad_batches=2,
        check_val_every_n_epoch=every,
        enable_validation=True,
        should_stop=False,
    )
    assert remaining_work(trainer) == expected


def test_the_time_that_is_left() -> None:
    assert Pace(step_seconds=6.0, steps=3, evaluation_seconds=2.0, evaluated_images=8).remaining(5, 4) == 11.0
    assert Pace(step_seconds=6.0, steps=3).remaining(5, 4) == 10.0


@pytest.mark.parametrize("wrong", [{"estimate_steps": 0}, {"estimate_seconds": 0.0}])
def test_an_estimate_before_any_step_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match="estimate_steps from 1 and estimate_seconds above 0"):
        EpochLines(**wrong)
