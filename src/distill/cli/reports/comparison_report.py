"""The answer of a comparison: tables and sentences on the terminal, a CSV file and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from distill.analysis import comparison as analysis
from distill.analysis.comparison import Comparison, Difference, Row
from distill.analysis.configurations import measured
from distill.analysis.statistics import MOST_SEEDS, Interval, student_quantile
from distill.cli.runs.finished_runs import expand_folders, read_runs
from distill.cli.runs.related_runs import UNRELATED
from distill.cli.runs.sweep_folder import EQUAL, job_folders, recorded_words
from distill.cli.tables import print_line, print_table
from distill.files import atomic_write, read_json, write_text
from distill.run_folder import RunFolder
from distill.training.callbacks.history import to_csv
from distill.types import DistillError
from distill.units import MISSING, duration, percent

STUDENT_KEYS = ("data.source*", "distill*", "teacher*", "init", "model*")
"""Patterns of keys that may differ when a run resumes, but tell two configurations apart."""
MOST_LINES = 40
"""Largest number of differing keys that are printed; the JSON file has all."""
CSV, JSON, PAGE = "comparison.csv", "comparison.json", "comparison.html"
COLORS = {"gain shown": "green", "loss shown": "red", "no difference shown": "yellow", "not decided": "yellow"}


def free_keys() -> list[str]:
    """Patterns of keys that do not change a result: the machine, what is printed, where files are."""
    return [key for key in UNRELATED if not any(key.startswith(start.rstrip("*")) for start in STUDENT_KEYS)]


def compare_folders(
    folders: Sequence[Path],
    equal: str = "epochs",
    labels: Mapping[frozenset[str], str] | None = None,
    images: bool = True,
) -> Comparison:
    """Compare the runs in these folders. Folders without a finished run are left out.

    Raises:
        DistillError: there is no finished run.
    """
    runs, left_out = read_runs(folders)
    return analysis.compare(runs, left_out, free_keys(), equal, labels, images)


def compare_paths(paths: Sequence[Path], equal: str | None = None, images: bool = True) -> Comparison:
    """Compare the finished runs in folders of runs and sweeps.

    A single sweep keeps the settings of its own comparison (`equal`, names of configurations), so its page and its
    table agree.

    Args:
        paths: folders of runs and sweeps.
        equal: ``epochs`` or ``time``; None: as recorded, else ``epochs``.
        images: whether to compute intervals over images.

    Raises:
        DistillError: there is no finished run.
    """
    recorded, labels = read_recorded_comparison(paths[0]) if len(paths) == 1 else (None, {})
    return compare_folders(expand_folders(paths), equal or recorded or EQUAL[0], labels, images)


def read_recorded_comparison(folder: Path) -> tuple[str | None, dict[frozenset[str], str]]:
    """Read from a sweep's comparison.json what was kept equal, and the names of configurations by their overrides.

    (None, {}) if the file is missing or cannot be read. The names are left out if further jobs finished after it was
    written.
    """
    file = folder / JSON
    if not file.is_file():
        return None, {}
    with suppress(DistillError, KeyError, TypeError):
        content = read_json(file)
        names = {Path(run["folder"]).name: str(run["configuration"]) for run in content["runs"]}
        words = {
            name: frozenset(word for word in recorded_words(folder / name) if not word.startswith("seed="))
            for name in names
        }
        finished = {job.name for job in job_folders(folder) if RunFolder(job).finished}
        labels = {words[name]: label for name, label in names.items()} if finished <= names.keys() else {}
        equal = content["equal"] if content["equal"] in EQUAL else EQUAL[0]
        return equal, dict(sorted(labels.items(), key=lambda item: len(item[0])))
    return None, {}


def is_worth_showing(comparison: Comparison) -> bool:
    """Whether there is something to compare: several seeds, or a difference to a student alone."""
    roles = {row.configuration: row.role for row in comparison.rows}
    differences = [row.difference for row in comparison.rows if row.difference]
    return any(len(row.seeds) > 1 for row in comparison.rows) or any(
        roles.get(difference.reference) == "student alone" for difference in differences
    )


def print_comparison(comparison: Comparison, settings: bool = True) -> None:
    """Print the tables, what was left out, and a sentence for each difference.

    Args:
        comparison: the comparison.
        settings: whether to print the settings that differ.
    """
    values, changes = value_table(comparison), difference_table(comparison)
    print_table(values.title, values.columns, values.rows, compact=True)
    print_table(changes.title, changes.columns, changes.rows, left=2, compact=True)
    for row, difference in differences(comparison):
        print_line(
            difference.verdict, f"{row.configuration}: {describe(difference, comparison)}", COLORS[difference.verdict]
        )
    for note in comparison.notes:
        print_line("note", note)
    if settings and comparison.settings:
        _print_settings(comparison)
    for folder, reason in comparison.left_out:
        print_line("left out", f"{folder}: {reason}", "yellow")


class Cells(NamedTuple):
    """A table as texts; None is an empty cell."""

    title: str
    columns: Sequence[str]
    rows: list[list[str | None]]


def value_table(comparison: Comparison) -> Cells:
    """Metrics and times of the teacher and of each configuration."""
    names = [name for name in measured(comparison.split) if any(name in row.values for row in comparison.rows)]
    return Cells(
        f"{comparison.split}, percent; means over seeds, {_short(comparison.metric)} with the standard deviation",
        ("configuration", "seeds", *map(_short, names), "s/step", "time"),
        [_value_cells(row, names, comparison.metric) for row in comparison.rows],
    )


def differences(comparison: Comparison) -> list[tuple[Row, Difference]]:
    """The configurations that have a reference, with their differences to it."""
    return [(row, row.difference) for row in comparison.rows if row.difference]


def difference_table(comparison: Comparison) -> Cells:
    """Differences of the main metric with their intervals."""
    return Cells(
        f"difference in {_short(comparison.metric)}, percentage points; 95 % intervals over seeds (Student's t) and "
        "over the images of one seed (bootstrap)",
        ("configuration", "to", "seeds", "difference", "over seeds", "over images", "gap closed", "extra time"),
        [_difference_cells(row, difference) for row, difference in differences(comparison)],
    )


def _short(metric: str) -> str:
    return metric.partition("/")[2]


def _value_cells(row: Row, names: Sequence[str], main: str) -> list[str | None]:
    cells = []
    for name in names:
        value = percent(row.values[name]) if name in row.values else None
        spread = f" ± {100 * row.deviation:.1f}" if name == main and value and row.deviation is not None else ""
        cells.append(f"{value}{spread}" if value else None)
    return [
        row.configuration,
        str(len(row.seeds)) if row.seeds else None,
        *cells,
        None if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
        None if row.seconds is None else duration(row.seconds),
    ]


def _difference_cells(row: Row, difference: Difference) -> list[str | None]:
    return [
        row.configuration,
        difference.reference,
        str(len(difference.seeds)),
        points(difference.mean),
        _range(difference.by_seed),
        _range(difference.by_image),
        None if difference.gap_closed is None else f"{100 * difference.gap_closed:.0f} %",
        None if difference.extra_time is None else f"{100 * difference.extra_time:+.0f} %",
    ]


def points(value: float) -> str:
    """A difference in percentage points, with one decimal; with two if it is small, so that its sign shows."""
    digits = 1 if abs(value) >= 0.0005 or value == 0 else 2
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def _range(interval: Interval | None) -> str | None:
    return None if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def describe(difference: Difference, comparison: Comparison) -> str:
    """A difference in a sentence: its interval, how few seeds that is, what the extra time was, and what to do next."""
    text = f"{points(difference.mean)} {_short(comparison.metric)} over {difference.reference}"
    count = len(difference.seeds)
    if difference.by_seed is None:
        text += f", of one seed ({difference.seeds[0]}), so there is no interval over seeds: run more seeds (seeds=3)"
    else:
        text += (
            f", 95 % interval {_range(difference.by_seed)} over {count} seeds (t = {student_quantile(count - 1):.2f})"
            f"{'' if difference.by_seed.excludes_zero else ', which contains 0'}"
        )
        if difference.verdict == "no difference shown":
            text += f"; {_further(difference.further_seeds)}"
    if difference.by_image is not None:
        text += f"; over the images of seed {difference.seeds[0]}: {_range(difference.by_image)}"
    if difference.extra_time is not None and abs(difference.extra_time) >= 0.01:
        amount = f"{100 * abs(difference.extra_time):.0f} % {'more' if difference.extra_time > 0 else 'less'} time"
        text += f"; it took {amount}"
        if comparison.equal == "epochs":
            length = "at equal epochs" if difference.equal_length else "with another number of epochs or steps"
            text += f" {length} (equal=time compares at equal time)"
    return text


def _further(seeds: int | None) -> str:
    if seeds is None:
        return f"more than {MOST_SEEDS} seeds would be needed to tell them apart, if the spread stays"
    return f"about {seeds} more seed{'' if seeds == 1 else 's'} would decide it, if mean and spread stay"


def _print_settings(comparison: Comparison) -> None:
    """Print the settings that differ. A loss or a teacher that not all configurations have is one line."""
    names = [row.configuration for row in comparison.rows if row.role != "teacher"]
    rows: dict[str, list[str | None]] = {}
    for key, values in comparison.settings.items():
        part = _optional_part(key)
        if part and len(values) < len(names):
            rows[part] = ["yes" if name in values else None for name in names]
        elif key != "distill.losses":  # the empty mapping of a student alone
            rows[key] = [values.get(name) for name in names]
    shown = list(rows.items())[:MOST_LINES]
    print_table("settings that differ", ("key", *names), [[key, *cells] for key, cells in shown], len(names) + 1, True)
    if len(rows) > len(shown):
        print_line("", f"and {len(rows) - len(shown)} more keys; --json FILE writes all of them")


def _optional_part(key: str) -> str:
    """The part of a configuration that a key belongs to and that some configurations lack: a loss, or the teacher."""
    parts = key.split(".")
    return ".".join(parts[:3]) if key.startswith("distill.losses.") else parts[0] if parts[0] == "teacher" else ""


def write_comparison(comparison: Comparison, csv: Path | None, json_file: Path | None) -> None:
    """Write the rows as CSV, and everything as JSON; None: no such file. Files are replaced atomically."""
    if csv is not None:
        write_text(csv, to_csv(_without_none(analysis.to_rows(comparison))))
    if json_file is not None:
        write_text(json_file, json.dumps(analysis.to_json(comparison), indent=1))


def write_page(comparison: Comparison, file: Path) -> Path:
    """Write the comparison as a page that needs no network, with its plots beside it.

    ``comparison.png`` has the differences. If configurations differ in the value of one number only, such as a loss
    weight, ``comparison_settings.png`` has the metric over this number.
    """
    from distill.analysis.charts import line_charts
    from distill.analysis.figures import difference_figure
    from distill.analysis.html_page import Plot, Section, Table, render_page
    from distill.analysis.setting_curves import setting_curves

    compared = differences(comparison)
    plots = []
    if compared:
        picture = file.with_suffix(".png")
        figure = difference_figure(
            {row.configuration: difference for row, difference in compared}, _short(comparison.metric)
        )
        atomic_write(picture, lambda handle: figure.savefig(handle, format="png"))
        plots.append(Plot(picture, "Differences of the table below: mean, and 95 % interval over the seeds."))
    if curves := setting_curves(comparison):
        picture = file.with_name(f"{file.stem}_settings.png")
        chart = line_charts(curves, "value", f"{_short(comparison.metric)}, percent", unit=False)
        atomic_write(picture, lambda handle: chart.savefig(handle, format="png"))
        plots.append(Plot(picture, "The metric over one setting, where all others are equal. Mean over the seeds."))
    values, changes = (
        Table(table.columns, [[cell or MISSING for cell in row] for row in table.rows], table.title)
        for table in (value_table(comparison), difference_table(comparison))
    )
    sentences = [
        f"{difference.verdict}: {row.configuration}: {describe(difference, comparison)}."
        for row, difference in compared
    ]
    names = [row.configuration for row in comparison.rows if row.role != "teacher"]
    keys = [[key, *(cells.get(name, MISSING) for name in names)] for key, cells in comparison.settings.items()]
    sections = [
        Section("Verdict", [*sentences, *comparison.notes], plots=plots),
        Section("Results", tables=[values]),
        Section("Differences", tables=[changes] if compared else []),
        Section("Settings that differ", tables=[Table(("key", *names), keys)] if keys else []),
        Section("Left out", [f"{folder}: {reason}" for folder, reason in comparison.left_out]),
    ]
    lead = f"{len(comparison.runs)} runs on the {comparison.split} split. Metrics are in percent."
    return write_text(file, render_page("Comparison", lead, sections))


def _without_none(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: "" if value is None else value for name, value in row.items()} for row in rows]
