"""Reports of a training run: its opening lines, loggers, and the files of the run folder."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from distill.cli.config.compose import own_files
from distill.cli.config.config_folders import own_folders
from distill.cli.reports.closing_tables import print_comparison, print_next_steps, print_results, student_name
from distill.cli.runs.preflight import RunPlan
from distill.cli.runs.related_runs import RelatedRun, baseline_command, find_related_runs, fingerprint_recipe
from distill.cli.runs.results import measured_by
from distill.cli.runs.resume import write_slurm_job
from distill.cli.runs.teacher_cache import teacher_overrides
from distill.cli.tables import print_line
from distill.data.advice import training_advice
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_student
from distill.diagnostics.cost import ModelRow, measure_row, summarize
from distill.evaluation.evaluate import evaluate
from distill.evaluation.pictures import panel, save_panel
from distill.evaluation.recording import DetectionRecorder, save_recording
from distill.files import load_tensors, write_text
from distill.run_folder import RunFolder
from distill.training.callbacks.history import find_history
from distill.training.callbacks.prediction_images import compare_columns, predict_columns, unpadded_images
from distill.training.distiller import Distiller
from distill.training.wandb_run import WandbRun
from distill.types import DistillError


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
        save_student(
            module.student, plan.folder.path, {"category_ids": data.category_ids, "resize": data.resize_options}
        )
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
        "balance": module.balance and module.balance.summary(list(plan.losses)),
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
        print_results(summary, plan.folder, plan.config["role"])
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
    name = student_name({"losses": list(plan.losses)}, plan.config["role"])
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
