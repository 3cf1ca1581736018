"""The report of the verb bench: builds the models, measures, prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from distill.cli.assembly import assemble, build_student
from distill.cli.instantiate import without_weights
from distill.cli.preflight import RunPlan
from distill.cli.tables import print_line, print_table
from distill.cli.teacher_cache import UNTRAINED, as_teacher, find_teacher, untrained
from distill.data.datamodule import DetectionData
from distill.diagnostics.bench import measure as timing
from distill.diagnostics.bench.clock import Clock, Spread
from distill.diagnostics.bench.report import Cost, OptionCost, Report, verdict
from distill.diagnostics.bench.step import Step
from distill.diagnostics.memory import Memory
from distill.precision import autocast_context
from distill.progress import track
from distill.teacher import Teacher
from distill.types import Batch, DistillError


def measure(plan: RunPlan, options: Mapping[str, Callable[[], RunPlan]], args: argparse.Namespace) -> Report:
    """Measure the student's step, the step of every distill option, the data loader and the evaluation.

    Args:
        plan: describes student, teacher and data.
        options: name of a distill option -> function that makes its plan.
        args: command line arguments.

    Raises:
        DistillError: an option cannot be built; with ``--all`` the report lists the options that cannot.
    """
    device, data = plan.device, plan.data
    clock = Clock(device, args.clock)
    data.setup("fit")
    batch = next(iter(data.train_dataloader())).to(device)
    student = build_student(plan, data, **without_weights(plan.config["model"])).to(device)
    timing.set_norm_statistics(student, batch)
    student.train()
    precision = plan.trainer.settings["precision"]
    make_step = partial(Step, batch=batch, autocast=partial(autocast_context, precision, device))
    alone = make_step(assemble(replace(plan, losses={}, inherit=False), data, student))
    teacher = bench_teacher(plan, data, batch) if options else None
    own = timing.measure_student(alone, clock, args.repeats, args.warmup)
    costs: dict[str, OptionCost] = {}
    skipped: dict[str, str] = {}
    for name, make_plan in track(options.items(), "options"):
        try:
            module = assemble(make_plan(), data, student, teacher)
            module.start_epoch(0, data)
            # One option at a time, so that it has all of the memory.
            costs[name] = timing.measure_option(alone, make_step(module), clock, args.repeats, args.warmup)
        except DistillError as error:
            if not args.all:
                raise
            skipped[name] = str(error)
    setting = {
        "overrides": list(args.overrides),
        "batch": list(batch.images.shape),
        "student_parameters": student.parameters_count,
        "teacher_parameters": teacher.detector.parameters_count if teacher else 0,
        "teacher": teacher.source if teacher else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "clock": clock.kind,
        "repeats": args.repeats,
        "torch": str(torch.__version__),
    }
    loader = timing.measure_loader(data, args.batches)
    evaluation = timing.measure_evaluation(student, data, plan.metrics, device, images=args.images)
    report = Report(setting, own, costs, skipped, loader, evaluation)
    report.verdict = verdict(report, len(batch))
    return report


def bench_teacher(plan: RunPlan, data: DetectionData, batch: Batch) -> Teacher | None:
    """The teacher of ``teacher.weights``, else an untrained teacher whose norms have the statistics of the batch."""
    if plan.teacher is None:
        return None
    if plan.teacher.weights is not None:
        return find_teacher(plan.teacher, data)
    detector = untrained(plan.teacher, data.classes).to(batch.images.device)
    timing.set_norm_statistics(detector, batch)
    return as_teacher(plan.teacher, detector.cpu(), UNTRAINED)


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
