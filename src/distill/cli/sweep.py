"""The table that a sweep leaves: one row a job, on the terminal and as CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from distill.files import write_text

SHOWN = ("val/AP", "val/AP50", "val/mAP", "test/AP", "test/mAP")


class SweepTable(Callback):
    """After the last job, gathers each job's ``summary.json`` and its overrides into ``sweep.csv``."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the table anew after each job: one that fails ends the sweep, but not the table."""
        if config.hydra.mode == RunMode.MULTIRUN:
            _write(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table: what was varied, and the main numbers."""
        folder = Path(config.hydra.sweep.dir)
        rows = _write(folder)
        names = dict.fromkeys(name for row in rows for name in row)
        varied = [name for name in names if "/" not in name and len({str(row.get(name)) for row in rows}) > 1]
        numbers = [name for name in names if name in SHOWN]
        _print(list(dict.fromkeys(["job", *varied, "state", *numbers])), rows, folder)


def _write(folder: Path) -> list[dict[str, Any]]:
    rows = [_row(job) for job in sorted(folder.iterdir(), key=_number) if job.is_dir()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "sweep.csv", page.getvalue())
    return rows


def _number(job: Path) -> tuple[bool, int, str]:
    return (not job.name.isdigit(), int(job.name) if job.name.isdigit() else 0, job.name)


def _row(job: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"job": job.name}
    overrides = job / "overrides.yaml"
    if overrides.is_file():
        row |= dict(str(line).partition("=")[::2] for line in OmegaConf.load(overrides))
    summary = job / "summary.json"
    if not summary.is_file():
        return row | {"state": "failed"}
    report = json.loads(summary.read_text())
    return row | {"state": "done"} | {name: round(value, 4) for name, value in report["student"].items()}


def _print(columns: list[str], rows: list[dict[str, Any]], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"sweep {escape(str(folder))}")
    for column in columns:
        table.add_column(escape(column))
    for row in rows:
        table.add_row(*(escape(str(row.get(column, ""))) for column in columns))
    Console().print(table)
