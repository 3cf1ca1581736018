"""The folder of a sweep: the folders and states of its jobs, and ``sweep.csv`` with one row per job."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from distill.cli.config.overrides import read_overrides
from distill.files import write_text
from distill.run_folder import RunFolder

METRICS = ("val/AP", "val/mAP", "test/AP", "test/mAP")
ALONE = "alone/"
"""Prefix of the columns with the results of a job's baseline, for ``baseline=train`` and ``baseline=RUN``."""
EQUAL = ("epochs", "time")
"""What a comparison of a sweep keeps equal (``equal=time``); the first is the default."""


def job_folders(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs, by number."""
    jobs = [job for job in folder.iterdir() if RunFolder(job).overrides.is_file()] if folder.is_dir() else []
    return sorted(jobs, key=_job_order)


def _job_order(job: Path) -> tuple[bool, int, str]:
    return (not job.name.isdigit(), int(job.name) if job.name.isdigit() else 0, job.name)


def recorded_words(job: Path) -> set[str]:
    """The overrides that a job recorded, without those of its resume."""
    lines = set(read_overrides(job))
    return {line for line in lines if not line.startswith("ckpt_path=")}


def table_row(job: Path) -> dict[str, Any]:
    """The row of a job: its overrides, its state, and the results of its student or its error."""
    row: dict[str, Any] = {"job": job.name}
    row |= dict(line.partition("=")[::2] for line in read_overrides(job))
    if RunFolder(job).finished:
        report = json.loads(RunFolder(job).summary.read_text())
        row |= {"state": "done"} | {name: round(value, 4) for name, value in report["student"].items()}
        alone = (report.get("baseline") or {}).get("values", {})
        return row | {f"{ALONE}{name}": round(alone[name], 4) for name in METRICS if name in alone}
    if RunFolder(job).error.is_file():
        return row | {"state": "failed", "error": RunFolder(job).error.read_text()}
    return row | {"state": "unfinished"}


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Write ``sweep.csv`` from the folders of the jobs, and return its rows."""
    rows = [table_row(job) for job in job_folders(folder)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "sweep.csv", page.getvalue())
    return rows


def count_failed(folder: Path) -> int:
    """Number of failed jobs in a sweep's folder."""
    return sum(table_row(job)["state"] == "failed" for job in job_folders(folder))


def count_done(folder: Path) -> int:
    """Number of finished jobs in a sweep's folder."""
    return sum(RunFolder(job).finished for job in job_folders(folder))
