"""The tables of a sweep: its jobs, and the comparison of their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.cli.runs.sweep import continuation_advice
from distill.cli.runs.sweep_folder import count_done, count_failed, job_folders, write_table
from distill.cli.tables import print_line, print_table
from distill.types import DistillError
from distill.units import percent

TABLE_METRICS = ("val/AP", "val/AP50", "val/mAP", "test/AP", "test/mAP")


def show_jobs(folder: Path) -> None:
    """Print a row for each job: the varied keys, the main metrics, and errors of failed jobs; nothing without jobs."""
    if not job_folders(folder):
        return
    rows = write_table(folder)
    names = dict.fromkeys(name for row in rows for name in row)
    varied = [name for name in names if "/" not in name and len({str(row.get(name)) for row in rows}) > 1]
    numbers = [name for name in names if name in TABLE_METRICS]
    columns = dict.fromkeys(["job", *(name for name in varied if name != "error"), "state", *numbers])
    cells = [
        [percent(row[name]) if name in TABLE_METRICS and name in row else row.get(name) for name in columns]
        for row in rows
    ]
    print_table(f"sweep {folder}, AP in percent", list(columns), cells, len(columns))
    for row in rows:
        if "error" in row:
            print(f"job {row['job']} failed: {row['error']}")
    if count_failed(folder):
        print(continuation_advice(folder))


def show_table(
    folder: Path,
    equal: str = "epochs",
    labels: Mapping[frozenset[str], str] | None = None,
    always: bool = False,
    files: tuple[Path | None, Path | None, Path | None] = (None, None, None),
    images: bool = True,
) -> None:
    """Print the jobs, and compare their configurations if there is something to compare.

    ``comparison.csv``, ``comparison.json`` and ``comparison.html`` in the folder have the comparison.

    Args:
        folder: folder of the sweep.
        equal, labels, images: see `distill.analysis.comparison.compare`.
        always: whether to compare even without several seeds and without a student alone.
        files: another CSV file, JSON file and page of the comparison; None: no such file.
    """
    show_jobs(folder)
    if not count_done(folder):
        return
    from distill.cli.reports import comparison_report as report

    try:
        comparison = report.compare_folders(job_folders(folder), equal, labels, images)
    except DistillError as error:  # the jobs are done; their table stands above
        print(f"distill: {error}")
        return
    if always or report.is_worth_showing(comparison):
        csv, json_file, page = files
        report.write_comparison(comparison, csv, json_file)
        report.write_comparison(comparison, folder / report.CSV, folder / report.JSON)
        if page is not None:
            report.write_page(comparison, page)
        report.print_comparison(comparison, settings=False)
        print_line("report", report.write_page(comparison, folder / report.PAGE))
