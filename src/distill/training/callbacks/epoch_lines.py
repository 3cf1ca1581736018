"""Lines on the terminal and in log files: how long the run will take, and the results of each epoch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import rich
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.markup import escape

from distill.training import lightning_compat as compat
from distill.training.callbacks.history import Row, find_history
from distill.training.distiller import Distiller
from distill.types import DistillError
from distill.units import duration, percent, time_of_day


@dataclass
class Pace:
    """Seconds of training steps and of evaluations in this process."""

    step_seconds: float = 0.0
    steps: int = 0
    evaluation_seconds: float = 0.0
    evaluated_images: int = 0

    def remaining(self, steps: float, images: int) -> float:
        """Expected seconds of so many further optimizer steps and evaluated images."""
        each = self.step_seconds / max(1, self.steps)
        return steps * each + images * self.evaluation_seconds / max(1, self.evaluated_images)


class EpochLines(L.Callback):
    """Prints a line after each epoch, and an estimate of the duration soon after the start. Only rank 0 prints.

    A line has the means of the losses, the metric and its best value in percent, the duration of the epoch, and the
    expected duration of the rest of the run, with its closing evaluations. Epochs count from 1. The losses come from
    the callback `History`.

    Args:
        model: what the run trains, ``student`` or ``teacher``. The lines of a teacher say so.
        monitor: name of the metric.
        estimate_steps: the estimate is printed after this many steps,
        estimate_seconds: or after this many seconds, if that is earlier.

    Raises:
        DistillError: ``estimate_steps`` below 1, or ``estimate_seconds`` not above 0.
    """

    def __init__(
        self,
        model: str = "student",
        monitor: str = "val/AP",
        estimate_steps: int = 20,
        estimate_seconds: float = 30.0,
    ) -> None:
        if estimate_steps < 1 or not estimate_seconds > 0:
            raise DistillError(
                "callbacks.lines: expected estimate_steps from 1 and estimate_seconds above 0, got "
                f"estimate_steps={estimate_steps}, estimate_seconds={estimate_seconds}"
            )
        self.model, self.monitor = model, monitor
        self.estimate_steps, self.estimate_seconds = estimate_steps, estimate_seconds
        self.pace = Pace()
        self._estimated = False
        self._began = self._mark = self._evaluation_began = time.monotonic()
        self._first_step = -1

    # -- time

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the first step of the epoch, which waits for the loader."""
        self._mark = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Time the steps but for the first one, which is a warm-up, and print the estimate when it is due."""
        if not compat.step_completed(trainer):
            return
        now = time.monotonic()
        if self._first_step < 0:
            self._first_step = trainer.global_step
        else:
            self.pace.step_seconds += now - self._mark
            self.pace.steps += 1
        self._mark = now
        late = now - self._began >= self.estimate_seconds
        if not self._estimated and self.pace.steps and (self.pace.steps >= self.estimate_steps or late):
            self._estimated = True
            self._print_estimate(trainer, pl_module)
            self._mark = time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of an evaluation."""
        self._evaluation_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time an evaluation."""
        if not trainer.sanity_checking:
            self.pace.evaluation_seconds += time.monotonic() - self._evaluation_began
            self.pace.evaluated_images += validation_images(trainer)

    # -- lines

    @rank_zero_only
    def _print_estimate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps, evaluations = remaining_work(trainer)
        if not math.isfinite(steps) or steps < 1:
            return
        pace, note = self.pace, ""
        if not pace.evaluated_images and evaluations:
            assert isinstance(module, Distiller)
            seconds, images = time_detection(trainer, module)
            pace = Pace(pace.step_seconds, pace.steps, seconds, images)
        images = remaining_images(trainer, evaluations)
        left, evaluating = pace.remaining(steps, images), pace.remaining(0, images)
        if evaluating:
            note = f" and {duration(evaluating)} of evaluation"
        step = pace.step_seconds / pace.steps
        print_progress(
            f"{self._prefix}time",
            f"about {duration(left)} left, until {time_of_day(left)}: {steps:.0f} steps of {step:.2g} s{note} on "
            f"{device_name(module)}",
        )

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch."""
        history = find_history(trainer)
        if history is None or not history.rows:
            return
        row = history.rows[-1]
        epochs = trainer.max_epochs
        number = f"{row['epoch']:{len(str(epochs))}d}/{epochs}" if epochs and epochs > 0 else f"{row['epoch']}"
        parts = [describe_losses(row), describe_metric(history.rows, self.monitor), duration(row["seconds"])]
        steps, evaluations = remaining_work(trainer)
        if math.isfinite(steps) and self.pace.steps:
            left = self.pace.remaining(steps, remaining_images(trainer, evaluations))
            if left >= 1:
                parts.append(f"left {duration(left)}, until {time_of_day(left)}")
        print_progress(f"{self._prefix}epoch {number}", "  ".join(part for part in parts if part))

    @property
    def _prefix(self) -> str:
        return "" if self.model == "student" else f"{self.model} "


def describe_losses(row: Row) -> str:
    """``loss 1.234 (detection 0.834, distillation 0.400)``; without distillation terms only the total."""
    if "loss/total" not in row:
        return ""
    text = f"loss {row['loss/total']:.3f}"
    if "loss/distillation" in row:
        text += f" (detection {row['loss/detection']:.3f}, distillation {row['loss/distillation']:.3f})"
    return text


def describe_metric(rows: list[Row], name: str) -> str:
    """``AP 23.4, best 25.1 in epoch 7``: the metric of the last epoch, if it was measured, and the best one so far."""
    measured = [row for row in rows if row.get(name, -1.0) >= 0]
    if not measured:
        return ""
    best = max(measured, key=lambda row: row[name])
    label = name.partition("/")[2] or name
    now = f"{label} {percent(rows[-1][name])}, " if rows[-1] is measured[-1] else ""
    return f"{now}best {percent(best[name])} in epoch {best['epoch']}"


def remaining_work(trainer: L.Trainer) -> tuple[float, int]:
    """Optimizer steps and evaluations during the training that are left. Infinitely many without an end."""
    total = float(trainer.estimated_stepping_batches)
    steps = max(0.0, total - trainer.global_step)
    per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    every = trainer.check_val_every_n_epoch
    if not every or not trainer.enable_validation or not math.isfinite(total):
        return steps, 0
    period = per_epoch * every
    evaluations = math.ceil(total / period) - trainer.global_step // period
    return (0.0, 0) if trainer.should_stop or not steps else (steps, max(0, evaluations))


def remaining_images(trainer: L.Trainer, evaluations: int) -> int:
    """Images that are left to evaluate: in evaluations during the training, and with the best weights at its end."""
    data = compat.data_module(trainer)
    closing = sum(len(data.records(split)) for split in ("val", "test") if split in data.checked)
    return evaluations * validation_images(trainer) + closing


def validation_images(trainer: L.Trainer) -> int:
    """Images of one evaluation during the training."""
    data = compat.data_module(trainer)
    images = len(data.records("val"))
    if trainer.num_val_batches:
        batches = sum(count for count in trainer.num_val_batches if math.isfinite(count))
    else:  # Lightning counts the batches at the start of the first evaluation
        limit = trainer.limit_val_batches
        all_batches = math.ceil(images / (data.eval_batch_size * trainer.world_size))
        batches = limit if isinstance(limit, int) else int(all_batches * limit)
    return int(min(images, batches * data.eval_batch_size * trainer.world_size))


def time_detection(trainer: L.Trainer, module: Distiller) -> tuple[float, int]:
    """Seconds in which the student detects the objects of some validation images on one process, for all processes.

    Returns:
        the seconds, and the number of images that all processes evaluate in them.
    """
    data = compat.data_module(trainer)
    batch = data.load_batch("val", range(min(data.eval_batch_size, validation_images(trainer)))).to(module.device)
    training = module.student.training
    module.student.eval()
    start = time.monotonic()
    for detections in module.student.view(batch, training=False, frozen=True).detections:
        detections.scores.tolist()  # waits for the device
    seconds = time.monotonic() - start
    module.student.train(training)
    return seconds, len(batch) * trainer.world_size


def device_name(module: L.LightningModule) -> str:
    """``CPU``, or the name of the GPU."""
    return torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else module.device.type.upper()


def print_progress(label: str, text: str) -> None:
    """Print a line above the progress bar. The console writes it at once, also to a file."""
    gap = " " * max(2, 10 - len(label))  # as in the lines at the start of a run
    rich.get_console().print(f"[bold]{escape(label)}[/]{gap}{escape(text)}", highlight=False, soft_wrap=True)
