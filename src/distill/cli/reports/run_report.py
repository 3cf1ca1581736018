"""Reports of a training run: lines on the terminal, loggers, and the files of the run folder."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from distill.analysis.comparison import BETTER_TEACHER
from distill.cli.config.compose import own_files
from distill.cli.config.config_folders import own_folders
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.related_runs import RelatedRun, baseline_command, find_related_runs, fingerprint_recipe
from distill.cli.runs.results import measured_by, read_summary
from distill.cli.runs.resume import write_slurm_job
from distill.cli.runs.teacher_cache import teacher_overrides
from distill.cli.tables import print_line, print_table
from distill.data.advice import training_advice
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_student
from distill.diagnostics.cost import COST_COLUMNS, ModelRow, cost_of, measure_row, summarize
from distill.evaluation.evaluate import evaluate
from distill.evaluation.metric import SHARED
from distill.evaluation.pictures import panel, save_panel
from distill.evaluation.recording import DetectionRecorder, save_recording
from distill.files import load_tensors, write_text
from distill.run_folder import RunFolder
from distill.training.callbacks.history import find_history
from distill.training.callbacks.prediction_images import compare_columns, predict_columns, unpadded_images
from distill.training.distiller import Distiller
from distill.training.wandb_run import WandbRun
from distill.types import DistillError
from distill.units import duration, percent

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP", "mask_AP")
"""Metrics in the closing table."""


@rank_zero_only
def write_config(plan: RunPlan) -> None:
    """Write the resolved configuration, and the overrides and options from which it can be composed again."""
    write_text(plan.folder.config, OmegaConf.to_yaml(plan.config))
    write_text(plan.folder.overrides, OmegaConf.to_yaml(list(plan.overrides)))
    if own_folders():
        _copy_options(plan)
    write_slurm_job(plan.folder.path)


def _copy_options(plan: RunPlan) -> None:
    """Copy the options of the user and of plugins that compose this run, and the run that trains its teacher."""
    files = own_files(plan.overrides)
    if plan.needs_teacher and plan.teacher is not None and plan.teacher.weights is None:
        files |= own_files(teacher_overrides(plan.teacher))
    for name, file in files.items():
        write_text(plan.folder.options / name, file.read_text(encoding="utf-8"))


@rank_zero_only
def print_data(plan: RunPlan, data: DetectionData) -> None:
    """Print what was read, and the values that were chosen for it."""
    for line in data.summary:
        print_line("data", line)
    for line in plan.choices:
        print_line("auto", line)
    for line in training_advice(data, plan.size_is_chosen):
        print_line("advice", line, "yellow")


@rank_zero_only
def print_opening(plan: RunPlan, module: Distiller) -> None:
    """Print student, teacher and losses."""
    student = module.student
    print_line(plan.config["role"], _model_line(student))
    for line in student.report:
        print_line("", line)
    if module.teacher is not None:
        teacher = module.teacher.detector
        print_line("teacher", f"{_model_line(teacher)}, {module.teacher.source}")
    for name, loss in module.losses.items():
        print_line("loss", f"{name}: {loss.weights}")
    print_line("run", plan.folder.path)


def _model_line(detector: Detector) -> str:
    spec = detector.spec
    size = f"{detector.parameters_count / 1e6:.2f} M parameters"
    return f"{spec.family}, {size}, norm {spec.norm}, {len(spec.classes)} classes"


@contextmanager
def open_loggers(plan: RunPlan, trainer: L.Trainer) -> Iterator[None]:
    """Open the loggers, log the configuration, and close the loggers at the end. W&B records how the run ended.

    Raises:
        DistillError: a logger refuses its options, or cannot reach its service.
    """
    failed = True
    try:
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            try:
                if isinstance(logger, WandbRun):
                    logger.choose_id(resumed=plan.checkpoint is not None)
                if hasattr(type(logger), "experiment"):
                    _ = logger.experiment  # created on first access
                logger.log_hyperparams(dict(plan.config))
            except Exception as error:  # TensorBoard, W&B and others raise errors of any class
                raise DistillError(
                    f"{type(logger).__name__} cannot begin: {error}. Correct its keys under logger, or choose another "
                    "one (CSV is always written)"
                ) from error
        yield
        failed = False
    finally:
        for logger in trainer.loggers:
            # A logger that did not open cannot close. Only the first failure is reported.
            with suppress(Exception) if failed else nullcontext():
                logger.finalize("failed" if failed else "success")
                if isinstance(logger, WandbRun):
                    logger.close(failed)


def finish_run(
    plan: RunPlan,
    trainer: L.Trainer,
    module: Distiller,
    data: DetectionData,
    splits: Sequence[str],
    started: float,
    baseline: RelatedRun | None = None,
) -> dict[str, Any]:
    """Export and evaluate the best student; write pictures and the summary; print the table. Returns the summary.

    Args:
        plan: plan of the run.
        trainer: trainer of the run, after the training.
        module: student, teacher and losses.
        data: data of the run.
        splits: the splits on which the student is evaluated.
        started: when the run started, by ``time.monotonic``.
        baseline: the run of the student alone that the table compares with; None: one that is found.
    """
    best = _load_best(trainer, module)
    device = trainer.strategy.root_device  # Lightning has moved the module back to the CPU
    if trainer.is_global_zero:
        save_student(module.student, plan.folder.path, {"category_ids": data.category_ids, "resize": data.resize})
    values: dict[str, float] = {}
    for split in splits:
        recorder = DetectionRecorder(data.ground_truth(split), data.classes)
        metrics = [*module.metrics, lambda *_, recorder=recorder: recorder]
        results = evaluate(module.student, data, split, metrics, device, f"{plan.config['role']}, {split}")
        if trainer.is_global_zero and recorder.recording is not None:
            save_recording(plan.folder.detections_on(split), recorder.recording)
        values |= {f"{split}/{name}": value for name, value in results.items()}
        _measure_teacher(module, data, split, device)
    terms = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("term/", "loss/", "lr-"))
    }
    recipe = fingerprint_recipe(plan, data, trainer.world_size)
    rows = _measure_rows(plan, module, data, values, device) if trainer.is_global_zero else {}
    summary = {
        "student": values,
        "measured": measured_by(plan.config["metrics"], data, splits),
        "teacher": module.teacher.identity() if module.teacher else None,
        "losses": list(plan.losses),
        "recipe": recipe,
        "parameters": _parameters(module),
        "cost": {model: summarize(row.cost) for model, row in rows.items()},
        "terms": terms,
        "baseline": baseline and {"source": str(baseline.folder), "values": baseline.summary["student"]},
        "skipped_steps": module.guard.skipped,
        "best_checkpoint": best,
        "images": len(data.training_records("train")),
        "seconds": round(time.monotonic() - started, 1),
        "training": _training_length(trainer),
        "versions": _versions(),
        "git": _git_commit(),
    }
    if trainer.is_global_zero:
        if plan.pictures:
            alone = load_detector(baseline.folder) if baseline else None
            _save_pictures(module, data, plan.pictures, plan.folder.pictures, device, alone)
        write_text(plan.folder.summary, json.dumps(summary, indent=1))
        _print_results(summary, plan.folder, plan.config["role"])
        if plan.config["role"] == "student":
            related = find_related_runs(plan, recipe)
            if baseline:
                related = [baseline, *(run for run in related if not run.is_baseline)]
            print_comparison(summary, rows, related, baseline_command(plan))
            if isinstance(data.source, Shapes) and plan.losses:
                print_next_steps(plan)
        _log_results(trainer, module, data, values, plan.folder)
    return summary


def _measure_teacher(module: Distiller, data: DetectionData, split: str, device: torch.device) -> None:
    """Measure a teacher on a split where it was not measured: it learned from other data, or is no run of distill.

    A teacher that was not measured on the validation split (``teacher.evaluate=false``) is not measured here, either.
    """
    teacher = module.teacher
    if teacher is None or not teacher.values or any(name.startswith(f"{split}/") for name in teacher.values):
        return
    results = evaluate(teacher.detector, data, split, module.metrics, device, f"teacher, {split}")
    teacher.values |= {f"{split}/{name}": value for name, value in results.items()}


def _measure_rows(
    plan: RunPlan, module: Distiller, data: DetectionData, values: Mapping[str, float], device: torch.device
) -> dict[str, ModelRow]:
    """Results and costs of the student and of the teacher, if there is one."""
    images: int = plan.config["cost"]
    name = _student_name({"losses": list(plan.losses)}, plan.config["role"])
    rows = {"student": measure_row(name, values, module.student, data, device, images)}
    if module.teacher is not None:
        known = module.teacher.values
        rows["teacher"] = measure_row("teacher", known, module.teacher.detector, data, device, images)
    return rows


def _log_results(
    trainer: L.Trainer, module: Distiller, data: DetectionData, values: Mapping[str, float], folder: RunFolder
) -> None:
    """Log to W&B the results of the best weights, a table of predictions, and the student's files if wanted."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun):
            logger.log_results(values)
            logger.log_predictions(module, data)
            logger.log_files(folder)


def _load_best(trainer: L.Trainer, module: Distiller) -> str | None:
    """Load the weights of the best checkpoint into the student, and return the checkpoint's path."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        return None
    state = load_tensors(Path(path))["state_dict"]
    weights = {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
    module.student.load_state_dict(weights, strict=True)
    return str(path)


def _training_length(trainer: L.Trainer) -> dict[str, float] | None:
    """Epochs and seconds of the training with its evaluations, over all processes of a resumed run."""
    history = find_history(trainer)
    if history is None or not history.rows:
        return None
    return {"epochs": history.rows[-1]["epoch"], "seconds": round(sum(row["seconds"] for row in history.rows), 1)}


def _save_pictures(
    module: Distiller, data: DetectionData, count: int, folder: Path, device: torch.device, alone: Detector | None
) -> None:
    """Draw validation images with ground truth and the boxes of teacher and student, and of the student alone."""
    count = min(count, len(data.ground_truth("val")["images"]))
    batch = data.load_batch("val", range(count)).to(device)
    columns = predict_columns(module, batch)
    if alone is not None:
        columns = compare_columns(columns, alone.to(device).eval(), batch)
    for number, image in enumerate(unpadded_images(batch)):
        boxes = {name: column[number] for name, column in columns.items()}
        save_panel(folder / f"{batch.ids[number]}.png", panel(image, boxes, data.classes))


def _parameters(module: Distiller) -> dict[str, int]:
    counts = {"student": module.student.parameters_count}
    if module.teacher is not None:
        counts["teacher"] = module.teacher.detector.parameters_count
    return counts


def _print_results(summary: Mapping[str, Any], run: RunFolder, role: str = "student") -> None:
    """Print the metrics of teacher and student on all splits, and the paths of the results."""
    columns = [name for name in COLUMNS if f"val/{name}" in summary["student"]]
    teacher = (summary["teacher"] or {}).get("values") or {}
    results = {"teacher": teacher, _student_name(summary, role): summary["student"]}
    rows = [
        [f"{model}{classes}", split, *(percent(values.get(f"{split}/{prefix}{name}", -1.0)) for name in columns)]
        for model, values in results.items()
        for split in ("val", "test")
        for prefix, classes in (("", ""), (SHARED, ", shared classes"))
        if f"{split}/{prefix}AP" in values or f"{split}/{prefix}mAP" in values
    ]
    print_table("validation and test, percent", ("", "split", *columns), rows, left=2)
    paths = (run.student, run.pictures, run.curves, run.summary)
    for label, path in zip((role, "pictures", "curves", "summary"), paths, strict=True):
        if path.exists():
            print_line(label, path)


def _student_name(summary: Mapping[str, Any], role: str = "student") -> str:
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
    others = [replace(student, name=_student_name(run.summary), results=run.summary["student"]) for run in related]
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


def _versions() -> dict[str, str]:
    packages = ("distill", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "pycocotools")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _git_commit() -> str | None:
    """The checkout's commit; None for an installed package."""
    if not (Path(__file__).parents[4] / ".git").exists():
        return None
    try:
        process = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
