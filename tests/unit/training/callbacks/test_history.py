"""The history of a run: means of epochs, rows of steps, and what a resume makes of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from distill.losses.defeat import DeFeat
from distill.training.callbacks.checkpoints import LastCheckpoint
from distill.training.callbacks.history import History, Means, append_row, loss_sums, read_rows, set_aside
from distill.training.distiller import Distiller
from helpers.grids import mostly_exhaustive
from helpers.training import distiller, fit


class Stopped(Exception):
    """Ends a training in the middle, as a kill does."""


class Recorder(L.Callback):
    """Keeps the values of all batches, and ends the training after the hook of a step or of an epoch."""

    def __init__(self, step: int | None = None, epoch: int | None = None) -> None:
        self.step, self.epoch = step, epoch
        self.batches: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Distiller)
        self.batches.append({name: value.item() for name, value in pl_module.last_batch.named().items()})

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stopped

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Stopped


def train(folder: Path, recorder: Recorder, checkpoint: Path | None = None, **options: Any) -> list[dict[str, float]]:
    """Two epochs of two steps, with an evaluation after the second; a checkpoint after every step."""
    settings: dict[str, Any] = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 2, **options}
    callbacks = [History(folder), recorder, LastCheckpoint(folder, "1 steps")]
    module = distiller(losses={"defeat": DeFeat})
    fit(module, folder, ckpt_path=checkpoint, callbacks=callbacks, enable_checkpointing=True, **settings)
    return recorder.batches


def rows(file: Path) -> list[dict[str, str]]:
    found = list(csv.DictReader(file.open()))
    for row in found:
        row.pop("seconds", None)
        row.pop("evaluation_seconds", None)
    return found


def test_an_epoch_s_row_has_means_and_a_step_s_row_the_values_of_its_batch(tmp_path: Path) -> None:
    batches = train(tmp_path, Recorder())
    epochs, steps = rows(tmp_path / "metrics.csv"), rows(tmp_path / "steps.csv")
    assert [(row["epoch"], row["step"]) for row in epochs] == [("1", "2"), ("2", "4")]
    assert [row["step"] for row in steps] == ["1", "2", "3", "4"]
    for name in batches[0]:
        for number, row in enumerate(epochs):
            pair = [batch[name] for batch in batches[2 * number : 2 * number + 2]]
            assert float(row[name]) == pytest.approx(sum(pair) / 2, rel=1e-6), name
        assert [float(row[name]) for row in steps] == pytest.approx([batch[name] for batch in batches], rel=1e-6)
    for row in (*epochs, *steps):
        parts = float(row["loss/detection"]), float(row["loss/distillation"])
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(float(row["loss/total"]), rel=1e-5)
        assert float(row["lr"]) == pytest.approx(0.02)
    assert [bool(row["val/AP"]) for row in epochs] == [False, True]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


STOPS = [{"step": 1}, {"step": 3}, {"epoch": 0}, {"epoch": 1}]


@pytest.mark.parametrize("where", mostly_exhaustive(STOPS, [STOPS[0], STOPS[3]]), ids=str)
def test_a_resumed_run_neither_repeats_nor_misses_a_row(
    where: dict[str, int], tmp_path: Path, whole: tuple[list[dict[str, str]], ...]
) -> None:
    """Killed inside an epoch, and after the row of an epoch but before its checkpoint. A torn last row is removed."""
    with pytest.raises(Stopped):
        train(tmp_path, Recorder(**where))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("1,99,0.0")
    train(tmp_path, Recorder(), tmp_path / "last.ckpt")
    assert (rows(tmp_path / "metrics.csv"), rows(tmp_path / "steps.csv")) == whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], ...]:
    """The rows of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, Recorder())
    return rows(folder / "metrics.csv"), rows(folder / "steps.csv")


def test_a_resume_in_another_folder_has_all_epochs(tmp_path: Path, whole: tuple[list[dict[str, str]], ...]) -> None:
    with pytest.raises(Stopped):
        train(tmp_path / "first", Recorder(step=3))
    train(tmp_path / "second", Recorder(), tmp_path / "first" / "last.ckpt")
    assert rows(tmp_path / "second" / "metrics.csv") == whole[0]


def test_a_new_run_keeps_the_files_of_an_earlier_run_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    for text in ("first", "second"):
        file.write_text(text)
        set_aside(file)
    assert {other.name: other.read_text() for other in tmp_path.iterdir()} == {
        "metrics.1.csv": "first",
        "metrics.2.csv": "second",
    }
    set_aside(file)  # there is none


def test_a_run_shorter_than_the_logging_interval_leaves_rows(tmp_path: Path) -> None:
    batches = train(tmp_path, Recorder(), max_steps=1, log_every_n_steps=20, limit_val_batches=0)
    for name in ("metrics.csv", "steps.csv"):
        (row,) = rows(tmp_path / name)
        assert float(row["loss/total"]) == pytest.approx(batches[0]["loss/total"], rel=1e-6)


def test_loggers_get_the_means_of_the_epoch(tmp_path: Path) -> None:
    class Log(L.pytorch.loggers.CSVLogger):
        seen: dict[str, float] = {}  # noqa: RUF012

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.seen.update({f"{name} {step}": value for name, value in metrics.items()})

    logger = Log(tmp_path / "logs")
    batches = train(tmp_path, Recorder(), logger=logger, log_every_n_steps=20, limit_val_batches=0)
    for name in ("loss/total", "term/defeat/neck.foreground"):
        mean = sum(batch[name] for batch in batches[2:]) / 2
        assert logger.seen[f"epoch/{name} 3"] == pytest.approx(mean, rel=1e-6)
    assert logger.seen["epoch/loss/distillation 3"] > 0


def test_means_leave_out_batches_that_are_not_finite() -> None:
    means = Means()
    for value in (1.0, math.nan, math.inf, 3.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(7.0)})
    assert means.compute() == {"a": 2.0, "b": 7.0}
    means.reset()
    means.add({"a": torch.tensor(math.nan)})
    assert math.isnan(means.compute()["a"])


def test_means_of_terms_that_only_some_batches_have() -> None:
    means = Means()
    means.add({"a": torch.tensor(1.0)})
    means.add({"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
    means.add({"a": torch.tensor(6.0)})
    restored = Means()
    restored.load(means.state())
    assert restored.compute() == {"a": 3.0, "b": 5.0}


def test_a_row_with_a_new_column_keeps_the_rows_before(tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    for row in ({"a": 1}, {"a": 2}, {"b": 3, "a": 4}, {"a": 5}):
        append_row(file, row)
    assert [(row["a"], row["b"]) for row in read_rows(file)] == [("1", ""), ("2", ""), ("4", "3"), ("5", "")]


def test_sums_of_losses() -> None:
    values = {
        "loss/student/a": 1.0,
        "loss/student/b": 2.0,
        "term/student/a": 9.0,
        "loss/x/neck": 4.0,
        "loss/total": 7.0,
    }
    assert loss_sums(values) == {"loss/detection": 3.0, "loss/distillation": 4.0}
    assert loss_sums({"loss/student/a": 1.0, "loss/total": 1.0}) == {"loss/detection": 1.0}
