"""Examines a planned run for the command doctor. The report is a nested mapping with one entry for each section."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from distill.analysis.comparison import describe_regime
from distill.cli.config import instantiate
from distill.cli.reports.run_estimate import PATIENCE, estimate_run
from distill.cli.runs import preflight
from distill.cli.runs.assembly import assemble, build_student, build_trainer, silence_known_warnings
from distill.cli.runs.baseline import Baseline, plan_baseline
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.related_runs import find_related_runs, fingerprint_recipe
from distill.cli.runs.results import read_summary
from distill.cli.runs.teacher_cache import (
    UNTRAINED,
    as_teacher,
    find_teacher,
    run_config,
    teacher_run,
    untrained,
)
from distill.cli.tables import gib
from distill.data.advice import training_advice
from distill.data.datamodule import DetectionData
from distill.diagnostics import doctor
from distill.diagnostics.sampled_evaluation import evaluate_sample
from distill.evaluation.metric import SHARED
from distill.precision import autocast_context
from distill.teacher import Teacher
from distill.training.callbacks.term_check import TermCheck
from distill.training.distiller import Distiller
from distill.types import DistillError
from distill.units import percent

SAMPLE = 100
"""Maximum number of validation images on which the teacher is evaluated."""
Report = dict[str, Any]


def examine_run(cfg: DictConfig) -> Report:
    """Examine section by section. A part that cannot be built is a fault and ends the report."""
    silence_known_warnings()
    start = time.monotonic()
    report: Report = {"faults": [], "notes": []}
    try:
        plan = preflight.plan_run(cfg)
        trainer = build_trainer(plan)  # not run: provides device, precision, number of processes and limits
        data, splits = _examine_data(plan, report)
        preflight.check_metrics(plan, data)
        baseline = _examine_baseline(plan, data, splits, trainer, report)
        student = build_student(plan, data)
        teacher = _examine_teacher(plan, data, trainer, report)
        _examine_classes(report, data, student.spec.classes, teacher)
        examine_gap(plan, data, trainer, teacher, baseline, report)
        module = assemble(plan, data, student, teacher).to(trainer.strategy.root_device)
        _examine_step(report, module, data, trainer)
        _estimate_run(plan, report, module, data, trainer)
    except DistillError as error:
        report["faults"].append(str(error))
    report["seconds"] = round(time.monotonic() - start, 1)
    report["verdict"] = "not ready" if report["faults"] else "ready"
    return report


def _examine_data(plan: RunPlan, report: Report) -> tuple[DetectionData, list[str]]:
    """The data, and the splits on which the run is evaluated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data, splits = preflight.load_data(plan)
    # The notes include images in two splits. They are a fault only with data.on_overlap=raise, as in the run.
    report["notes"] += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    report["data"] = {split: doctor.describe_split(data, split) for split in ("train", *splits)}
    report["padding"] = doctor.padding_share(data)
    report["notes"] += [*plan.choices, *training_advice(data, plan.size_is_chosen)]
    for split, counts in list(report["data"].items())[1:]:
        absent = [name for name, boxes in counts["classes"].items() if not boxes["all"]]
        if absent:
            report["notes"].append(f"{split}: no box of {', '.join(absent)}: no AP is measured for these classes")
    return data, splits


def _examine_baseline(
    plan: RunPlan, data: DetectionData, splits: Sequence[str], trainer: L.Trainer, report: Report
) -> Baseline | None:
    """Report the run of the student alone that the run would train first, or the finished one that it compares with."""
    baseline = plan_baseline(plan, data, splits, trainer.world_size)
    if baseline is None:
        return None
    state = "ready" if baseline.run.finished else "not trained yet"
    section: Report = {"state": state, "folder": str(baseline.run.folder), "epochs": baseline.epochs}
    report["baseline"] = section
    if baseline.run.finished:
        return baseline
    with isolate_rng():
        module = Distiller(build_student(plan, data), schedule=plan.schedule).to(trainer.strategy.root_device)
        length = {"max_epochs": baseline.epochs, "max_steps": baseline.schedule["steps"]}
        every = {"check_val_every_n_epoch": baseline.schedule["evaluate_every"]}
        limits = SimpleNamespace(**{**plan.trainer.settings, **length, **every})
        section["estimate"] = estimate_run(limits, module, data, trainer)
    section["command"] = shlex.join(baseline.run.command)
    report["notes"].append("the student alone is not trained yet: the run trains it first, to compare with")
    return baseline


def _examine_teacher(plan: RunPlan, data: DetectionData, trainer: L.Trainer, report: Report) -> Teacher | None:
    """The evaluated teacher; an untrained teacher if none is cached; None if the run needs no teacher."""
    options = plan.teacher
    if not plan.needs_teacher or options is None:
        report["teacher"] = {"state": "not needed"}
        return None
    if options.weights is None:
        run = teacher_run(options)
        if not run.finished:
            detector, config = untrained(options, data.classes), run_config(run.overrides)
            module = Distiller(detector, schedule=instantiate.build_node(config.schedule)).to(
                trainer.strategy.root_device
            )
            report["teacher"] = {
                "state": "not trained yet",
                "folder": str(run.folder),
                "command": shlex.join(run.command),
                "estimate": estimate_run(config.trainer, module, data, trainer),
            }
            if options.train == "never":
                report["faults"].append(f"there is no trained teacher at {run.folder} and teacher.train=never")
            else:
                report["notes"].append(
                    "no teacher is cached: the run trains one first; the terms here are those of an untrained teacher"
                )
            return as_teacher(options, detector, UNTRAINED)
    teacher = find_teacher(options, data)
    section: Report = {
        "state": "ready",
        "source": teacher.source,
        "promised": _published_ap(teacher),
        "here": _ap(teacher.values, "val/"),
    }
    report["teacher"] = section
    device = trainer.strategy.root_device
    try:
        section["sample"] = evaluate_sample(teacher.detector, data, plan.metrics, device, SAMPLE, PATIENCE)
    except DistillError as error:
        report["notes"].append(f"the teacher's AP is not known: {error}")
    else:
        _compare_ap(options.min_ap, section, report)
    return teacher


def _compare_ap(min_ap: float | None, section: Report, report: Report) -> None:
    sample = section["sample"]
    values, of_classes = sample["values"], ""
    sample["AP"], sample["shared_AP"] = _ap(values), _ap(values, SHARED)
    ap: float = sample["AP"]
    if sample["shared_AP"] is not None:  # classes that the teacher does not know say nothing about its weights
        ap, of_classes = sample["shared_AP"], " of the classes that it knows"
    result = f"the teacher's AP{of_classes} on {sample['images']} validation images is {percent(ap)} %"
    remedy = "check its weights, its class list and the image size that it was trained with"
    expected = section["promised"] if section["here"] is None else section["here"]
    if expected is not None and ap < expected / 2:
        # A result on other images may not hold for this data.
        kind = "notes" if section["here"] is None else "faults"
        report[kind].append(f"{result}, but {section['source']} promises {percent(expected)} %: {remedy}")
    if min_ap is not None and ap < min_ap:
        report["faults"].append(f"{result}, below teacher.min_ap={min_ap}: {remedy}")


def examine_gap(
    plan: RunPlan,
    data: DetectionData,
    trainer: L.Trainer,
    teacher: Teacher | None,
    baseline: Baseline | None,
    report: Report,
) -> None:
    """Note whether the teacher is better than the student alone, by a finished run of the same student alone."""
    if teacher is None or teacher.source == UNTRAINED:
        return
    if baseline is None:
        related = find_related_runs(plan, fingerprint_recipe(plan, data, trainer.world_size))
        values = next((run.summary["student"] for run in related if run.is_baseline), None)
    elif baseline.run.finished:
        values = baseline.result().summary["student"]
    else:
        return  # it is noted already that the student alone is not trained yet
    section = report["teacher"]
    of_teacher = section["here"] if section["here"] is not None else section.get("sample", {}).get("AP")
    alone = None if values is None else _ap(values, "val/")
    if alone is None:
        report["notes"].append(
            "it is not known whether the teacher is better than the student alone, because no run of the same student "
            "with distill=none was found: baseline=train or python -m distill compare trains it"
        )
    elif of_teacher is not None:
        report["notes"].append(describe_regime(of_teacher, alone, "distill=none"))


def _ap(values: Mapping[str, float], prefix: str = "") -> float | None:
    """COCO's or VOC's AP, depending on the metric that was measured."""
    return values.get(f"{prefix}AP", values.get(f"{prefix}mAP"))


def _published_ap(teacher: Teacher) -> float | None:
    """The AP of these weights in a run's summary or in torchvision's enum, measured on any images."""
    results = read_summary(teacher.source).get("student")
    if results:
        return _ap(results, "val/")
    entry = getattr(type(teacher.detector).enum, "__members__", {}).get(teacher.source)
    metrics = entry.meta["_metrics"].get("COCO-val2017", {}) if entry is not None else {}
    return metrics["box_map"] / 100 if "box_map" in metrics else None


def _examine_classes(report: Report, data: DetectionData, student: Sequence[str], teacher: Teacher | None) -> None:
    report["classes"] = doctor.class_lists(data.classes, student, teacher.spec.classes if teacher else None)
    untaught = [row["data"] for row in report["classes"] if row["taught"] is False]
    if untaught:
        report["notes"].append(
            f"the teacher does not know {', '.join(untaught)}, which count 0 in its AP; class lists are matched by "
            "exact name"
        )


def _examine_step(report: Report, module: Distiller, data: DetectionData, trainer: L.Trainer) -> None:
    """Report maps, adapters and terms of the first step, and note terms above the limit of the run's `TermCheck`."""
    device, precision, teacher = trainer.strategy.root_device, str(trainer.precision), module.teacher
    module.start_epoch(0, data)
    batch = next(iter(data.train_dataloader())).to(device)
    with autocast_context(precision, device):
        step = module.compute_step(batch, module.step_seed(0), 0.0, loss_scale=1.0)
        with torch.no_grad():
            planned = teacher.spec if teacher and teacher.source == UNTRAINED else None
            report["shapes"] = doctor.shapes(step.student, planned or step.teacher)
    report["adapters"] = doctor.adapters(module.losses)
    report["terms"] = terms = doctor.measure_terms(step)
    report["batch"] = {"images": list(batch.ids), "shape": list(batch.images.shape)}
    checks = [callback for callback in trainer.callbacks if isinstance(callback, TermCheck)]  # type: ignore[attr-defined]
    times = min((check.times for check in checks), default=float("inf"))
    detection = sum(term["loss"] for name, term in terms.items() if name.startswith("student/"))
    for name, term in terms.items():
        if not abs(term["value"]) < float("inf"):
            report["faults"].append(
                f"the term {name} is not finite at step 0: set its weight to 0, or look at the data"
            )
        elif term["weight"] and not term["reaches"]:
            report["notes"].append(
                f"the term {name} has no gradient at step 0: it is detached from the student, or this "
                "batch has nothing for it"
            )
        if not name.startswith("student/") and abs(term["loss"]) > times * abs(detection):
            ratio = abs(term["loss"]) / max(abs(detection), 1e-30)
            report["notes"].append(
                f"the term {name} is {ratio:.3g} times the detection loss at step 0 (callbacks.terms.times={times:g}): "
                "lower its weight"
            )


def _estimate_run(plan: RunPlan, report: Report, module: Distiller, data: DetectionData, trainer: L.Trainer) -> None:
    report["estimate"] = estimate = estimate_run(trainer, module, data, trainer)
    if fault := plan.schedule.warmup_fault(estimate["batches"] // plan.schedule.accumulate):
        report["notes"].append(fault)
    estimate["bytes"] += doctor.state_bytes(module, plan.schedule)
    if estimate["bytes"] > estimate["device_bytes"]:
        report["faults"].append(
            f"a step takes about {gib(estimate['bytes'])}, but {estimate['device']} has "
            f"{gib(estimate['device_bytes'])}: lower data.batch_size (with schedule.accumulate for the same total), or "
            "data.max_size"
        )
