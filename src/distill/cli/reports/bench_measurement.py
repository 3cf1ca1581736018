"""Measures the student and the distill options of a plan for the command bench."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from distill.cli.config.instantiate import without_weights
from distill.cli.runs.assembly import assemble, build_student
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.teacher_cache import UNTRAINED, as_teacher, find_teacher, untrained
from distill.data.datamodule import DetectionData
from distill.diagnostics.bench import measure as timing
from distill.diagnostics.bench.clock import Clock
from distill.diagnostics.bench.report import OptionCost, Report, verdict
from distill.diagnostics.bench.step import Step
from distill.diagnostics.sampled_evaluation import evaluate_sample
from distill.precision import autocast_context
from distill.progress import track
from distill.teacher import Teacher
from distill.types import Batch, DistillError


def measure_plan(plan: RunPlan, options: Mapping[str, Callable[[], RunPlan]], args: argparse.Namespace) -> Report:
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
    student_cost = timing.measure_student(alone, clock, args.repeats, args.warmup)
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
    sample = evaluate_sample(student, data, plan.metrics, device, args.images)
    evaluation = {"images": float(sample["images"])} | {part: 1000 * sample[part] for part in ("detect", "metric")}
    report = Report(setting, student_cost, costs, skipped, loader, evaluation)
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
