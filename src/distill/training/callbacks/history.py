"""The history of a run: means of each epoch and values of single steps, in CSV files, loggers and a picture."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from distill import distributed
from distill.files import atomic_write, write_text
from distill.run_folder import RunFolder
from distill.training import lightning_compat as compat
from distill.training.distiller import Distiller

Row = dict[str, float]
DRAWING_INTERVAL = 10.0
"""Least seconds between two drawings. One takes about 0.2 s."""
DRAWN_METRICS = ("val/AP", "val/AP50", "val/AP75", "val/mAP", "val/mask_AP")


class Means:
    """Means of named scalars over batches. The sums stay on the device of the values, so that no batch waits for it.

    A batch with a value that is not finite, whose step is skipped, does not count.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        """Names -> the sum of each value, and the number of batches."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the scalars of a batch."""
        names = tuple(values)
        row = torch.stack([value.float() for value in values.values()])
        row = torch.where(row.isfinite().all(), torch.cat([row, row.new_ones(1)]), 0.0).to(_sum_type(row.device))
        self._sums[names] = self._sums[names] + row if names in self._sums else row

    def compute(self) -> Row:
        """The means by name over the batches of all processes. Every process must call this method."""
        sums: Row = {}
        counts: Row = {}
        for names, values in self.state().items():
            *parts, count = values.tolist()
            for name, part in zip(names, parts, strict=True):
                sums[name] = sums.get(name, 0.0) + part
                counts[name] = counts.get(name, 0.0) + count
        return {name: sums[name] / counts[name] if counts[name] else float("nan") for name in sums}

    def state(self) -> dict[tuple[str, ...], Tensor]:
        """The sums over all processes, on the CPU. Every process must call this method."""
        return {names: distributed.sum_over_ranks(values)[0].cpu() for names, values in self._sums.items()}

    def load(self, state: Mapping[tuple[str, ...], Tensor]) -> None:
        """Continue from the sums of all processes."""
        self._sums = {names: values if distributed.rank() == 0 else 0 * values for names, values in state.items()}

    def to(self, device: torch.device) -> None:
        """Move the sums to the device of the values that will be added."""
        self._sums = {names: values.to(device, _sum_type(device)) for names, values in self._sums.items()}

    def reset(self) -> None:
        """Forget all values."""
        self._sums = {}


def _sum_type(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class History(L.Callback):
    """Writes one row per epoch to ``metrics.csv``, one per logged step to ``steps.csv``, and draws ``curves.png``.

    Both files have the names of the loggers (``term/...``, ``loss/...``, ``val/...``), ``loss/detection`` and
    ``loss/distillation``, which are the sums of the student's own and of the distillation terms, and ``lr``. An epoch's
    row has the means over its batches, the results of its evaluation, if there was one, the ``seconds`` that it took
    with the evaluation, and the ``evaluation_seconds`` among them. The other loggers get the means as
    ``epoch/loss/...`` and ``epoch/term/...``. Epochs and steps count from 1; ``step`` is the number of finished
    optimizer steps.

    The rows of the epochs, and the sums of an epoch that has begun, are part of every checkpoint, and rows of steps
    after the checkpoint are removed when a run resumes. So no row is missing or repeated after a resume.

    Args:
        folder: folder of the files.
        curves: whether to draw ``curves.png``: after an epoch, at most every 10 seconds, and at the end.
    """

    def __init__(self, folder: str | Path, curves: bool = True) -> None:
        self.run = RunFolder(folder)
        self.curves = curves
        self.rows: list[Row] = []
        """The epochs so far."""
        self._means = Means()
        self._evaluated: Row = {}
        self._evaluation_began = time.monotonic()
        self._rate = 0.0
        self._seconds = 0.0
        """Duration of the epoch in earlier processes."""
        self._began = time.monotonic()
        self._step = 0
        """The last step in `steps.csv`."""
        self._resumed = False
        self._drawn = -math.inf
        """Time of the last drawing."""

    # -- resume

    def state_dict(self) -> dict[str, Any]:
        """Rows, and the sums of the current epoch over all processes. Every process must call this method."""
        sums = [{"names": list(names), "sums": values} for names, values in self._means.state().items()]
        seconds = self._seconds + time.monotonic() - self._began
        rows = [dict(row) for row in self.rows]
        return {"rows": rows, "means": sums, "lr": self._rate, "seconds": seconds, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows and sums of a checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._means.load({tuple(part["names"]): part["sums"] for part in state_dict["means"]})
        self._rate, self._seconds, self._step = (state_dict[name] for name in ("lr", "seconds", "step"))
        self._resumed = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove rows after the checkpoint. A new run renames the files of an earlier run in its folder."""
        self._began = time.monotonic()
        self._means.to(pl_module.device)
        if not trainer.is_global_zero:
            return
        if not self._resumed:
            for file in (self.run.metrics, self.run.steps):
                set_aside(file)
            return
        self._write_epochs()
        if self.run.steps.is_file():
            kept = [row for row in read_rows(self.run.steps) if int(row["step"]) <= self._step]
            write_text(self.run.steps, to_csv(kept))

    # -- a step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Remember the learning rate of the step, because the scheduler changes it before the step is logged."""
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Add the batch to the means, and write the step if it is logged, before a checkpoint can be saved."""
        assert isinstance(pl_module, Distiller)
        self._means.add(pl_module.last_batch.named())
        if pl_module.logs_this_step:
            self._write_step(trainer, pl_module)

    def _write_step(self, trainer: L.Trainer, module: Distiller) -> None:
        values = module.step_values()
        self._step = trainer.global_step
        if not trainer.is_global_zero:
            return
        numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        first = {"epoch": trainer.current_epoch + 1, "step": self._step, "lr": self._rate}
        append_row(self.run.steps, {**first, **with_sums(numbers)})

    # -- an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the means anew. Lightning does not call this hook if a run resumes inside an epoch."""
        self._means.reset()
        self._began, self._seconds = time.monotonic(), 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of an evaluation."""
        self._evaluation_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the duration and the results of the evaluation."""
        if not trainer.sanity_checking:
            results = trainer.callback_metrics.items()
            seconds = self._evaluated.get("evaluation_seconds", 0.0) + time.monotonic() - self._evaluation_began
            self._evaluated = {"evaluation_seconds": round(seconds, 3)}
            self._evaluated |= {name: float(value) for name, value in results if name.startswith("val/")}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the row of the epoch before the epoch's checkpoint is saved, draw the curves, and log the means."""
        means = with_sums(self._means.compute())
        row: Row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "lr": self._rate}
        row["seconds"] = round(self._seconds + time.monotonic() - self._began, 3)
        row |= {**self._evaluated, **means}
        self._evaluated = {}
        self.rows = [other for other in self.rows if other["epoch"] < row["epoch"]] + [row]
        if trainer.is_global_zero:
            self._write_epochs()
            self._draw_curves(every=DRAWING_INTERVAL)
        pl_module.log_dict({f"epoch/{name}": value for name, value in means.items()}, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves. Write the last step of a run that a limit of time ended, which is known after the step."""
        assert isinstance(pl_module, Distiller)
        if trainer.log_every_n_steps and trainer.global_step > self._step and pl_module.last_batch.terms:  # type: ignore[attr-defined]
            self._write_step(trainer, pl_module)
        if trainer.is_global_zero:
            self._draw_curves()

    def _write_epochs(self) -> None:
        if self.rows:
            write_text(self.run.metrics, to_csv(self.rows))

    def _draw_curves(self, every: float = 0.0) -> None:
        """Draw the curves, unless the last drawing ended less than this many seconds ago."""
        if self.rows and self.curves and time.monotonic() - self._drawn >= every:
            from distill.training.curves import draw_curves  # a short run need not wait for matplotlib

            figure = draw_curves(diagrams(self.rows))
            atomic_write(self.run.curves, lambda file: figure.savefig(file, format="png"))
            self._drawn = time.monotonic()


def loss_sums(values: Mapping[str, float]) -> Row:
    """``loss/detection`` and, if there are distillation terms, ``loss/distillation``, from the weighted terms."""
    losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    own = {name: value for name, value in losses.items() if name.startswith("student/")}
    others = {name: value for name, value in losses.items() if "/" in name and name not in own}
    sums = {"loss/detection": sum(own.values())} if own else {}
    return sums | ({"loss/distillation": sum(others.values())} if others else {})


def with_sums(values: Mapping[str, float]) -> Row:
    """The values of a step or an epoch, those of `loss_sums` and the total first."""
    total = {name: values[name] for name in ("loss/total",) if name in values}
    return {**total, **loss_sums(values), **values}


def diagrams(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The lines of ``curves.png``: losses, and metrics in percent."""

    def line(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(row["epoch"], factor * row[name]) for row in rows if name in row]

    losses = {name: line(f"loss/{name}") for name in ("total", "detection", "distillation")}
    if not losses["distillation"]:
        del losses["detection"]  # equals the total
    metrics = {name.removeprefix("val/"): line(name, 100.0) for name in DRAWN_METRICS}
    return {"loss, mean of the epoch": losses, "validation, percent": metrics}


# -- CSV


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header. A value that a row does not have is empty."""
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return page.getvalue()


def read_rows(file: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file. The last one is left out if its process was killed while it wrote."""
    text = file.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV file. A row with new columns rewrites the file."""
    columns: list[str] = []
    with suppress(FileNotFoundError), file.open(encoding="utf-8", newline="") as lines:
        columns = next(csv.reader(lines), [])
    if set(row) <= set(columns):
        with file.open("a", encoding="utf-8", newline="") as lines:
            csv.DictWriter(lines, columns, lineterminator="\n").writerow(row)
    else:
        write_text(file, to_csv([*(read_rows(file) if columns else ()), row]))


def set_aside(file: Path) -> None:
    """Rename a file of an earlier run in the same folder: ``metrics.csv`` -> ``metrics.1.csv`` and so on."""
    if file.is_file():
        number = 1 + len(list(file.parent.glob(f"{file.stem}.*{file.suffix}")))
        file.rename(file.with_name(f"{file.stem}.{number}{file.suffix}"))


def find_history(trainer: L.Trainer) -> History | None:
    """The run's history; None if its callback was removed."""
    return next((callback for callback in compat.callbacks(trainer) if isinstance(callback, History)), None)
