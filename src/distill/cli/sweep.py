"""The jobs of a sweep, each a process of its own, and the table that they leave: one row a job, on the terminal and as CSV.

A job that fails is recorded, and the next one starts. Given the same ``hydra.sweep.dir`` again, a sweep goes on where it
stopped: of the jobs in that folder those that are finished are not run again, those with a checkpoint are resumed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.cli import compose, resume
from distill.cli.signals import ended
from distill.cli.teacher import RANK_VARIABLES
from distill.files import write_text
from distill.run_folder import RunFolder
from distill.types import DistillError

SHOWN = ("val/AP", "val/AP50", "val/mAP", "test/AP", "test/mAP")


class JobFailed(DistillError):
    """One job failed; Hydra's sweepers hear of it only when the others are done."""


class Jobs:
    """The jobs of one sweep, as Hydra's sweeper hands them over."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.failed: list[str] = []

    def run(self, cfg: DictConfig) -> float:
        """One job: the metric of its run, which is done, resumed, or was finished before.

        Raises:
            JobFailed: what the run said last.
            DistillError: this very sweep is started more than once, by torchrun or SLURM.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise DistillError(
                "a sweep (-m) under torchrun or in several tasks of SLURM: each process would start the sweep anew. Start it "
                "once; every job starts its own processes (trainer=ddp)"
            )
        hydra = HydraConfig.get()
        overrides = [str(line) for line in hydra.overrides.task]
        self.folder = Path(hydra.sweep.dir)
        resume.note_job(self.folder)
        run = place(self.folder, Path(hydra.runtime.output_dir), overrides)
        if not RunFolder(run).finished:
            self._start(run, overrides)
        self.table()
        return float(json.loads(RunFolder(run).summary.read_text())["student"][cfg.metric])

    def _start(self, run: Path, overrides: Sequence[str]) -> None:
        RunFolder(run).error.unlink(missing_ok=True)
        write_text(
            RunFolder(run).overrides, OmegaConf.to_yaml(list(overrides))
        )  # so that a job that dies early is known
        going_on = ["ckpt_path=last"] if RunFolder(run).resumable else []
        command = [
            sys.executable,
            "-m",
            "distill",
            "train",
            *overrides,
            *going_on,
            f"hydra.run.dir={compose.quoted(str(run))}",
        ]
        code, error = execute(command, Path(HydraConfig.get().sweep.dir).name)
        if code == 130:
            raise KeyboardInterrupt
        if code or not RunFolder(run).finished:
            write_text(RunFolder(run).error, error)
            self.failed.append(run.name)
            self.table()
            raise JobFailed(f"job {run.name}: {error}")

    def table(self) -> list[dict[str, Any]]:
        """Write ``sweep.csv`` anew; its rows."""
        assert self.folder is not None
        rows = [_row(job) for job in _jobs(self.folder)]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        page = io.StringIO(newline="")
        writer = csv.DictWriter(page, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / "sweep.csv", page.getvalue())
        return rows

    def show(self) -> None:
        """Print the table: what was varied, the main numbers, and why a job failed; nothing outside a sweep."""
        if self.folder is None:
            return
        rows = self.table()
        names = dict.fromkeys(name for row in rows for name in row)
        varied = [name for name in names if "/" not in name and len({str(row.get(name)) for row in rows}) > 1]
        numbers = [name for name in names if name in SHOWN]
        _print(
            list(dict.fromkeys(["job", *(name for name in varied if name != "error"), "state", *numbers])),
            rows,
            self.folder,
        )
        if self.failed:
            print(*self.going_on())

    def going_on(self) -> list[str]:
        """What to say to let the sweep go on; nothing where it has not begun."""
        again = f"hydra.sweep.dir='{self.folder}' with the same words again runs what is not done"
        return [] if self.folder is None else [again]


def place(folder: Path, given: Path, overrides: Sequence[str]) -> Path:
    """The folder of a job: the one that holds these overrides, else the given one where it is free, else the next number."""
    for job in _jobs(folder):
        if said(job) == set(overrides):
            if job != given and given.is_dir() and not any(given.iterdir()):
                given.rmdir()  # Hydra made it
            return job.absolute()
    if not RunFolder(given).overrides.is_file():
        return given.absolute()
    numbers = [int(job.name) for job in folder.iterdir() if job.name.isdigit()]
    return (folder / str(max(numbers) + 1)).absolute()


def said(job: Path) -> set[str]:
    """The overrides that made a job, less those of its resume."""
    lines = set(compose.noted(job))
    return {line for line in lines if not line.startswith("ckpt_path=")}


def execute(command: Sequence[str], sweep: str) -> tuple[int, str]:
    """Run a job, its words passed on; its exit code and, for the case that it failed, its last word in one line.

    Raises:
        Terminated, KeyboardInterrupt: the sweep was asked to stop; the job has saved, and ended.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}
    last: deque[str] = deque(maxlen=20)
    child = subprocess.Popen(
        command, env=env | {"DISTILL_SWEEP": sweep}, stderr=subprocess.PIPE, text=True, errors="replace"
    )

    def listen() -> None:
        for line in child.stderr or ():
            sys.stderr.write(line)
            last.append(line.strip())

    with child:
        code = ended(child, listen)
    return code, _last_word(code, [line for line in last if line])


def _last_word(code: int, lines: Sequence[str]) -> str:
    ours = [line.removeprefix("distill: ") for line in lines if line.startswith("distill: ")]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (ours or [f"exit code {code}: {lines[-1]}" if lines else f"exit code {code}"])[-1]


def _jobs(folder: Path) -> list[Path]:
    found = [job for job in folder.iterdir() if RunFolder(job).overrides.is_file()] if folder.is_dir() else []
    return sorted(found, key=_number)


def _number(job: Path) -> tuple[bool, int, str]:
    return (not job.name.isdigit(), int(job.name) if job.name.isdigit() else 0, job.name)


def _row(job: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"job": job.name}
    row |= dict(line.partition("=")[::2] for line in compose.noted(job))
    if RunFolder(job).finished:
        report = json.loads(RunFolder(job).summary.read_text())
        return row | {"state": "done"} | {name: round(value, 4) for name, value in report["student"].items()}
    if RunFolder(job).error.is_file():
        return row | {"state": "failed", "error": RunFolder(job).error.read_text()}
    return row | {"state": "unfinished"}


def _print(columns: list[str], rows: list[dict[str, Any]], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"sweep {escape(str(folder))}", title_justify="left")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(row.get(column, ""))) for column in columns))
    console = Console()
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"job {row['job']} failed: {row['error']}", highlight=False, markup=False, soft_wrap=True)
