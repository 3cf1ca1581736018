"""The tables and lines that close a run: its results, what the distillation gained, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.analysis.comparison import BETTER_TEACHER
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.related_runs import RelatedRun
from distill.cli.runs.results import read_summary
from distill.cli.tables import print_line, print_table
from distill.diagnostics.cost import COST_COLUMNS, ModelRow, cost_of
from distill.evaluation.metric import SHARED
from distill.run_folder import RunFolder
from distill.units import duration, percent

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP", "mask_AP")
"""Metrics in the closing table."""


def print_results(summary: Mapping[str, Any], run: RunFolder, role: str = "student") -> None:
    """Print the metrics of teacher and student on all splits, and the paths of the results."""
    columns = [name for name in COLUMNS if f"val/{name}" in summary["student"]]
    teacher = (summary["teacher"] or {}).get("values") or {}
    results = {"teacher": teacher, student_name(summary, role): summary["student"]}
    rows = [
        [f"{model}{classes}", split, *(percent(values.get(f"{split}/{prefix}{name}", -1.0)) for name in columns)]
        for model, values in results.items()
        for split in ("val", "test")
        for prefix, classes in (("", ""), (SHARED, ", shared classes"))
        if f"{split}/{prefix}AP" in values or f"{split}/{prefix}mAP" in values
    ]
    print_table("validation and test, percent", ("", "split", *columns), rows, left=2)
    if balance := summary.get("balance"):
        factors = ", ".join(f"{method} {factor:.3g}" for method, factor in balance["factors"].items())
        print_line("balance", f"factors on the weights, measured in {balance['steps']} steps: {factors}")
    paths = (run.student, run.pictures, run.curves, run.summary)
    for label, path in zip((role, "pictures", "curves", "summary"), paths, strict=True):
        if path.exists():
            print_line(label, path)


def student_name(summary: Mapping[str, Any], role: str = "student") -> str:
    """Name of a run's student in a table."""
    if role != "student":
        return role
    losses = summary.get("losses")
    return "student alone" if losses == [] else f"distilled ({', '.join(losses)})" if losses else "student"


def print_comparison(
    summary: Mapping[str, Any], rows: Mapping[str, ModelRow], related: Sequence[RelatedRun], command: str
) -> None:
    """Print the table of the student alone, distilled students and the teacher, and what the distillation gained.

    Args:
        summary: summary of this run.
        rows: rows of this run's ``student`` and ``teacher``, if it has one.
        related: finished runs that differ in the distillation only, the newest one first.
        command: trains the same student alone.
    """
    split = "test" if any(name.startswith("test/") for name in summary["student"]) else "val"
    metric = next(name for name in ("AP", "mAP") if f"{split}/{name}" in summary["student"])
    related = [run for run in related if f"{split}/{metric}" in run.summary["student"]]
    student, teacher = rows["student"], rows.get("teacher")
    alone: ModelRow | None
    others = [replace(student, name=student_name(run.summary), results=run.summary["student"]) for run in related]
    baselines = [row for row, run in zip(others, related, strict=True) if run.is_baseline]
    distilled = [row for row, run in zip(others, related, strict=True) if run.summary["losses"]]
    distilled = list({row.name: row for row in reversed(distilled)}.values())  # the newest one of each method
    if summary["losses"]:
        alone, distilled = next(iter(baselines), None), [student]
    else:
        alone = student
        taught = [run.summary for run in related if run.summary["losses"] and run.summary["teacher"]]
        if teacher is None and taught:
            costs = cost_of((taught[0].get("cost") or {}).get("teacher"))
            teacher = ModelRow("teacher", taught[0]["teacher"]["values"], costs)
    table = [row for row in (alone, *distilled, teacher) if row] or [student]
    names = [name for name in (metric, "AP50") if f"{split}/{name}" in summary["student"]]
    title = f"{split}, percent"
    if student.cost:
        title += f"; one image at a time on {student.cost.device}"
    columns = ("", *names, *COST_COLUMNS)
    print_table(title, columns, [row.cells([f"{split}/{name}" for name in names]) for row in table], compact=True)
    if alone is None and summary["losses"]:
        print_line(
            "gain",
            "not known: no run of the same student alone was found. baseline=train trains it before the distilled "
            f"student. This command makes one now:\n{command}",
        )
    if summary["losses"] and teacher:
        _warn_of_weak_teacher(teacher.results.get(f"{split}/{metric}"), student.results[f"{split}/{metric}"])
    if alone and summary["losses"]:
        _print_training(summary, next(run.summary for run in related if run.is_baseline))
    if alone:
        taught_by = teacher.results.get(f"{split}/{metric}") if teacher else None
        for row in distilled:
            gain = describe_gain(alone.results[f"{split}/{metric}"], row.results[f"{split}/{metric}"], taught_by)
            print_line("gain", f"{row.name}: {gain}")


def _print_training(summary: Mapping[str, Any], alone: Mapping[str, Any]) -> None:
    """Print how long the student was trained alone and with distillation, and on how many images its teacher."""
    with_losses, without = summary.get("training"), alone.get("training")
    if with_losses and without:
        texts = [f"{duration(length['seconds'])} (epochs: {length['epochs']:.0f})" for length in (without, with_losses)]
        print_line("time", f"the student was trained for {texts[0]} alone, for {texts[1]} with distillation")
    source = (summary["teacher"] or {}).get("source")
    images = read_summary(source).get("images") if source else None
    if images and summary.get("images") not in (None, images):
        print_line("images", f"the student learned from {summary['images']}, the teacher from {images}")


def _warn_of_weak_teacher(teacher: float | None, student: float) -> None:
    """Warn of a teacher that is not better than the student that it taught."""
    if teacher is not None and teacher <= student:
        print_line(
            "warning",
            f"the teacher ({percent(teacher)}) is not better than its student ({percent(student)}), so it can hardly "
            f"help. {BETTER_TEACHER}",
            "yellow",
        )


def describe_gain(alone: float, distilled: float, teacher: float | None) -> str:
    """The gain over the student alone in percentage points, and the share of the gap to the teacher that it closes."""
    gain = f"{round(100 * (distilled - alone), 1) + 0.0:+.1f} AP over the student alone"
    if teacher is None or teacher < 0:
        return gain
    gap = teacher - alone
    if gap <= 0:
        return f"{gain}; the teacher ({percent(teacher)}) is not better than the student alone ({percent(alone)})"
    return f"{gain}: {100 * (distilled - alone) / gap:.0f} % of the gap of {100 * gap:.1f} to the teacher"


def print_next_steps(plan: RunPlan) -> None:
    """Print the commands that follow a run on drawn images."""
    method = [word for word in plan.overrides if word.startswith("distill=")][-1:]  # may be a list of options
    command = shlex.join(["python", "-m", "distill", "train", "data=DIR", *method, "baseline=train"])
    predict = shlex.join(["python", "-m", "distill", "predict", str(plan.folder.path)])
    print_line("next", f"this student's detections on images:\n{predict} IMAGES")
    print_line(
        "",
        "the same table for your own data, a folder in COCO's, VOC's or YOLO's format, with a teacher that learns from "
        f"more images:\n{command} teacher.data=LARGER_DIR",
    )
    print_line("", f"with a teacher that learns from the same images:\n{command}")
