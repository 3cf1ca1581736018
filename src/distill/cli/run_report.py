"""Reports of a training run: lines on the terminal, loggers, and the files of the run folder."""

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
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from distill.cli.preflight import RunPlan
from distill.cli.resume import write_slurm_job
from distill.cli.tables import print_line, print_table
from distill.cli.teacher_cache import measured_by
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.detectors.student_files import save_student
from distill.evaluation.evaluate import evaluate
from distill.evaluation.metric import SHARED
from distill.evaluation.pictures import panel, save_panel
from distill.files import load_tensors, write_text
from distill.run_folder import RunFolder
from distill.training.callbacks.prediction_images import predict_columns, unpadded_images
from distill.training.distiller import Distiller
from distill.types import DistillError

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP", "mask_AP")
"""Metrics in the closing table."""


@rank_zero_only
def write_config(plan: RunPlan) -> None:
    """Write the resolved configuration, and the overrides from which it can be composed again."""
    write_text(plan.folder.config, OmegaConf.to_yaml(plan.config))
    write_text(plan.folder.overrides, OmegaConf.to_yaml(list(plan.overrides)))
    write_slurm_job(plan.folder.path)


@rank_zero_only
def print_opening(plan: RunPlan, module: Distiller, data: DetectionData) -> None:
    """Print data, student, teacher and losses, and a warning if the teacher is smaller than the student."""
    for line in data.summary:
        print_line("data", line)
    for line in plan.choices:
        print_line("auto", line)
    student = module.student
    print_line("student", _model_line(student))
    for line in student.report:
        print_line("", line)
    if module.teacher is not None:
        teacher = module.teacher.detector
        print_line("teacher", f"{_model_line(teacher)}, {module.teacher.source}")
        if teacher.parameters_count < student.parameters_count:
            print_line(
                "warning",
                f"the teacher has fewer parameters ({teacher.parameters_count:,}) than its student "
                f"({student.parameters_count:,}); choose a larger one with teacher=…",
                "yellow",
            )
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
        _set_metrics_aside(plan.folder)
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            try:
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
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish(exit_code=int(failed))


@rank_zero_only
def _set_metrics_aside(run: RunFolder) -> None:
    """Rename the metrics file of the training before a resume to ``metrics.1.csv`` and so on.

    The logger writes a new metrics file.
    """
    if run.metrics.is_file():
        stem, suffix = run.metrics.stem, run.metrics.suffix
        number = 1 + len(list(run.path.glob(f"{stem}.*{suffix}")))
        run.metrics.rename(run.path / f"{stem}.{number}{suffix}")


def finish_run(
    plan: RunPlan,
    trainer: L.Trainer,
    module: Distiller,
    data: DetectionData,
    splits: Sequence[str],
    started: float,
) -> dict[str, Any]:
    """Export and evaluate the best student; write pictures and the summary; print the table. Returns the summary."""
    best = _load_best(trainer, module)
    device = trainer.strategy.root_device  # Lightning has moved the module back to the CPU
    if trainer.is_global_zero:
        save_student(module.student, plan.folder.path, {"category_ids": data.category_ids, "resize": data.resize})
    values: dict[str, float] = {}
    for split in splits:
        results = evaluate(module.student, data, split, module.metrics, device, f"student, {split}")
        values |= {f"{split}/{name}": value for name, value in results.items()}
    terms = {
        name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name and "val/" not in name
    }
    summary = {
        "student": values,
        "measured": measured_by(plan.config["metrics"], data, splits),
        "teacher": module.teacher.identity() if module.teacher else None,
        "parameters": _parameters(module),
        "terms": terms,
        "skipped_steps": module.guard.skipped,
        "best_checkpoint": best,
        "seconds": round(time.monotonic() - started, 1),
        "versions": _versions(),
        "git": _git_commit(),
    }
    if trainer.is_global_zero:
        if plan.pictures:
            _save_pictures(module, data, plan.pictures, plan.folder.pictures, device)
        write_text(plan.folder.summary, json.dumps(summary, indent=1))
        _print_results(summary, plan.folder)
        _log_results(trainer, values)
    return summary


def _log_results(trainer: L.Trainer, values: Mapping[str, float]) -> None:
    """Log the final results to W&B, as its summary and as a table of metrics and splits."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(values)
            rows = [[*name.split("/", 1), value] for name, value in values.items()]
            logger.log_table("AP", columns=["split", "metric", "value"], data=rows)


def _load_best(trainer: L.Trainer, module: Distiller) -> str | None:
    """Load the weights of the best checkpoint into the student, and return the checkpoint's path."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        return None
    state = load_tensors(Path(path))["state_dict"]
    own = {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
    module.student.load_state_dict(own, strict=True)
    return str(path)


def _save_pictures(module: Distiller, data: DetectionData, count: int, folder: Path, device: torch.device) -> None:
    count = min(count, len(data.ground_truth("val")["images"]))
    batch = data.load_batch("val", range(count)).to(device)
    columns = predict_columns(module, batch)
    for number, image in enumerate(unpadded_images(batch)):
        boxes = {name: column[number] for name, column in columns.items()}
        save_panel(folder / f"{batch.ids[number]}.png", panel(image, boxes, data.classes))


def _parameters(module: Distiller) -> dict[str, int]:
    counts = {"student": module.student.parameters_count}
    if module.teacher is not None:
        counts["teacher"] = module.teacher.detector.parameters_count
    return counts


def _print_results(summary: Mapping[str, Any], run: RunFolder) -> None:
    columns = [name for name in COLUMNS if f"val/{name}" in summary["student"]]
    results = {"teacher": (summary["teacher"] or {}).get("values") or {}, "student": summary["student"]}
    rows = [
        [
            *(f"{model}{classes}", split, *(percent(values.get(f"{split}/{prefix}{name}", -1.0)) for name in columns)),
            f"{summary['parameters'][model] / 1e6:.2f} M",
        ]
        for model, values in results.items()
        for split in ("val", "test")
        for prefix, classes in (("", ""), (SHARED, ", shared classes"))
        if f"{split}/{prefix}AP" in values or f"{split}/{prefix}mAP" in values
    ]
    print_table("validation and test, percent", ("", "split", *columns, "parameters"), rows, left=2)
    for label, path in (("student", run.student), ("pictures", run.pictures), ("summary", run.summary)):
        print_line(label, path)


def percent(value: float) -> str | None:
    """A metric in percent; None for -1, which metrics return where there is no ground truth of this kind."""
    return f"{100 * value:.1f}" if value >= 0 else None


def _versions() -> dict[str, str]:
    packages = ("distill", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "pycocotools")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _git_commit() -> str | None:
    """The checkout's commit; None for an installed package."""
    if not (Path(__file__).parents[3] / ".git").exists():
        return None
    try:
        process = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
