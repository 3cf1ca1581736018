"""The command bench: the cost of distillation and the bottleneck, on this machine with this data and these models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli.config import compose, override_checks
from distill.cli.config.overrides import parse_overrides
from distill.cli.startup import uncollected_imports
from distill.cli.tables import print_line, print_table
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.diagnostics.bench.clock import Spread
    from distill.diagnostics.bench.report import Cost, Report
    from distill.diagnostics.memory import Memory

COLUMNS = (
    "Columns of the table: teacher, adapters and recompute (student layers that the losses recompute) are relative to "
    "the student's own step. Overhead (loss_overhead) is the part of the step beyond the student's step and these "
    "three: losses, masks, and all operations without weights."
)


def main(argv: Sequence[str]) -> int:
    """``distill bench [--all] [--json FILE] [--csv FILE] [--repeats 10] [--clock cpu] [overrides]``."""
    parser = argparse.ArgumentParser(prog="distill bench", description=__doc__, epilog=COLUMNS)
    parser.add_argument("--all", action="store_true", help="every distill option that fits, not only the chosen one")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--csv", type=Path, help="also add the relative durations of the steps to this file")
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--batches", type=int, default=20, help="batches that the data loader is measured on")
    parser.add_argument("--images", type=int, default=50, help="images that the evaluation is measured on")
    parser.add_argument(
        "--clock", default="wall", help="wall, or cpu: processor time, which varies less on a busy machine"
    )
    parser.add_argument("overrides", nargs="*", help="as for train: model=frcnn_r18 distill=defeat data=coco …")
    args = parser.parse_intermixed_args(list(argv))
    if min(args.repeats, args.batches, args.images) < 1 or args.warmup < 0:
        raise DistillError("bench: --repeats, --batches and --images start at 1, --warmup at 0")
    cfg = override_checks.compose_without_run(args.overrides)
    configs = {"+".join(cfg.distill.losses): cfg} if cfg.distill.losses else {}
    if args.all:
        lines = parse_overrides(args.overrides)
        kept = [str(line.input_line) for line in lines if line.key_or_group.split(".")[0] != "distill"]
        kept.append(f"paths.run={cfg.paths.run}")
        names = [name for name in compose.config_groups()["distill"] if name != "none"]
        configs = {name: compose.compose_config([*kept, f"distill={name}"]) for name in names}

    with uncollected_imports():
        from distill.cli.reports.bench_measurement import measure_plan
        from distill.cli.runs.preflight import plan_run
        from distill.files import write_text

    options = {name: partial(plan_run, config) for name, config in configs.items()}
    report = measure_plan(plan_run(cfg), options, args)
    print_report(report)
    if args.json:
        write_text(args.json, json.dumps(report.plain(), indent=1))
    if args.csv:
        add_ratios(args.csv, report, f"{cfg.model._target_.rpartition('.')[2]}")
    return 0


def add_ratios(file: Path, report: Report, pair: str) -> None:
    """Add the duration of each option's step, relative to that of the student alone, to a CSV file.

    An option that the file has already keeps its row, so that several pairs can be measured for one file.

    Args:
        file: the file, which need not exist.
        report: the measurements.
        pair: name of the pair of detectors.
    """
    from distill.files import write_text

    text = file.read_text(encoding="utf-8") if file.is_file() else "distill,pair,ratio,low,high\n"
    known = {line.partition(",")[0] for line in text.splitlines()}
    rows = [
        f"{name},{pair},{cost.ratio.median:.3f},{cost.ratio.low:.3f},{cost.ratio.high:.3f}\n"
        for name, cost in report.options.items()
        if name not in known
    ]
    write_text(file, text + "".join(rows))


def print_report(report: Report) -> None:
    """Print the numbers as a table, and the verdict."""
    setting = report.setting
    size = "x".join(map(str, setting["batch"]))
    print_line("setting", f"batch {size}, {setting['device']}, {setting['threads']} threads, {setting['precision']}")
    models = "student untrained" + (f", teacher {setting['teacher']}" if setting["teacher"] else "")
    print_line("weights", f"{models}: untrained weights barely affect the timings")
    print_line("clock", f"{setting['clock']}; median of {setting['repeats']} rounds ± half of the interquartile range")
    recompute = any(cost.student_recompute_ratio.median for cost in report.options.values())
    columns = ["", "ms", "x student", "teacher", "adapters", *(["recompute"] if recompute else [])]
    rows = [
        [
            "student alone",
            _spread(report.student.step, 1000, 0),
            "1",
            *[""] * (len(columns) - 2),
            *_amounts(report.student),
        ]
    ]
    for name, cost in report.options.items():
        parts = [cost.teacher_ratio, cost.adapters_ratio, *([cost.student_recompute_ratio] if recompute else [])]
        rows.append(
            [
                *(name, _spread(cost.step, 1000, 0), f"{cost.ratio.median:.2f}"),
                *(f"{part.median:.3f}" for part in parts),
                *(_spread(cost.loss_overhead, 100, 1), *_amounts(cost)),
            ]
        )
    title = "a training step; teacher, adapters" + (" and student layers that losses recompute" if recompute else "")
    print_table(
        f"{title}, relative to the student's step", [*columns, "overhead, %", "GFLOP", "peak MiB"], rows, compact=True
    )
    for name, cost in report.options.items():
        print_line(f"{name} reads", "teacher's " + ", ".join(cost.stages))
        print_line(f"{name} in memory", _memory_sum(cost.bytes))
    for name, reason in report.skipped.items():
        print_line(f"{name} left out", reason)
    loader, evaluation = report.loader, report.evaluation
    rate = setting["batch"][0] / report.student.step.median
    print_line(
        "loader",
        f"{loader['images_per_second']:.1f} images/s from {loader['workers']:.0f} workers; the student alone consumes "
        f"{rate:.1f}",
    )
    print_line(
        "evaluation",
        f"{evaluation['detect'] + evaluation['metric']:.1f} s per 1,000 images ({evaluation['detect']:.1f} to load and "
        f"detect, {evaluation['metric']:.1f} to measure)",
    )
    for line in report.verdict:
        print_line("verdict", line)


def _spread(spread: Spread, unit: float, digits: int) -> str:
    return f"{unit * spread.median:.{digits}f}±{unit * (spread.high - spread.low) / 2:.{digits}f}"


def _memory_sum(memory: Memory) -> str:
    """The parts of a step's memory, their sum, and the peak."""
    parts = {
        "student alone": memory.student,
        "teacher weights": memory.teacher,
        "weights of the losses": memory.losses,
        "maps kept by the losses": memory.held,
    }
    words = " + ".join(f"{_mib(value)} {name}" for name, value in parts.items())
    return (
        f"{words} = {_mib(memory.sum)} MiB; "
        f"the step's peak is {_mib(memory.peak)} MiB, {memory.peak / memory.sum:.3f} of it"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _amounts(cost: Cost) -> tuple[str, str | None]:
    peak = cost.memory.get("device", cost.memory.get("host"))
    return f"{cost.flops / 1e9:.1f}", None if peak is None else f"{peak / 2**20:.0f}"
