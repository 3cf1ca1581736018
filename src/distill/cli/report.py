"""What a run says and leaves: its folder's files, the opening and closing words, the table."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.cli.compose import plain
from distill.cli.resume import note_job
from distill.cli.teacher import measure
from distill.data.datamodule import DetectionData
from distill.detectors.weights import save_student
from distill.evaluation.evaluate import evaluate
from distill.evaluation.pictures import panel, save_panel
from distill.files import load_tensors, write_text
from distill.run_folder import RunFolder
from distill.training.callbacks.prediction_images import crop, look
from distill.training.distiller import Distiller
from distill.types import DistillError

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP", "mask_AP")


@rank_zero_only
def write_config(run: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """``config.yaml`` resolved, and ``overrides.yaml`` from which it can be composed again."""
    write_text(RunFolder(run).config, OmegaConf.to_yaml(cfg, resolve=True))
    write_text(RunFolder(run).overrides, OmegaConf.to_yaml(list(overrides)))
    note_job(run)


@rank_zero_only
def keep_metrics(run: Path) -> None:
    """Set the ``metrics.csv`` of what was trained before a resume aside, as ``metrics.1.csv`` and so on: the logger begins anew."""
    file = RunFolder(run).metrics
    if file.is_file():
        number = 1 + len(list(run.glob(f"{file.stem}.*{file.suffix}")))
        file.rename(run / f"{file.stem}.{number}{file.suffix}")


@rank_zero_only
def opening(module: Distiller, data: DetectionData, run: Path) -> None:
    """Data, student, teacher and losses in a few lines; a warning where the teacher is the smaller one."""
    console = Console()
    for line in data.summary:
        console.print(f"[bold]data[/]     {escape(line)}", highlight=False)
    student = module.student
    console.print(f"[bold]student[/]  {_name(student)}", highlight=False)
    for line in student.report:
        console.print(f"         {escape(line)}", highlight=False)
    if module.teacher is not None:
        teacher = module.teacher.detector
        console.print(f"[bold]teacher[/]  {_name(teacher)}, {escape(module.teacher.source)}", highlight=False)
        if teacher.parameters_count < student.parameters_count:
            console.print(
                f"[yellow]warning[/]  the teacher has fewer parameters ({teacher.parameters_count:,}) than its student "
                f"({student.parameters_count:,}); choose a larger one with teacher=…"
            )
    for name, loss in module.losses.items():
        console.print(f"[bold]loss[/]     {name}: {loss.weights}", highlight=False)
    console.print(f"[bold]run[/]      {escape(str(run))}", highlight=False)


def _name(detector: Any) -> str:
    spec = detector.spec
    size = f"{detector.parameters_count / 1e6:.2f} M parameters"
    return f"{spec.family}, {size}, norm {spec.norm}, {len(spec.classes)} classes"


def open_loggers(trainer: L.Trainer, cfg: DictConfig) -> None:
    """Begin each logger's record, with the resolved configuration where it keeps one.

    Raises:
        DistillError: what a logger says of its options, or of the service that it cannot reach.
    """
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        try:
            if hasattr(type(logger), "experiment"):
                _ = logger.experiment  # made when it is first asked for
            logger.log_hyperparams(plain(cfg))
        except Exception as error:  # of TensorBoard, W&B, or any other
            raise DistillError(
                f"{type(logger).__name__} cannot begin: {error}. Mend its keys under logger, or choose another one (CSV is always "
                "written)"
            ) from error


def closing(
    cfg: DictConfig, trainer: L.Trainer, module: Distiller, data: DetectionData, run: Path, started: float, tested: bool
) -> dict[str, Any]:
    """Best weights -> student.pt, AP on val and test, pictures, summary.json, table."""
    best = _load_best(trainer, module)
    device = trainer.strategy.root_device  # the module itself is back on the CPU
    if trainer.is_global_zero:
        save_student(module.student, run, {"category_ids": data.category_ids, "resize": data.resize})
    values: dict[str, float] = {}
    splits = ["val", "test"] if tested else ["val"]
    for split in splits:
        measured = evaluate(module.student, data, split, module.metrics, device, f"student, {split}")
        values |= {f"{split}/{name}": value for name, value in measured.items()}
    summary = {
        "student": values,
        "measured": measure(cfg, data, splits),
        "teacher": module.teacher.identity() if module.teacher else None,
        "parameters": _parameters(module),
        "terms": {
            name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name and "val/" not in name
        },
        "skipped_steps": module.guard.skipped,
        "best_checkpoint": best,
        "seconds": round(time.monotonic() - started, 1),
        "versions": _versions(),
        "git": _git(),
    }
    if trainer.is_global_zero:
        if cfg.pictures:
            _pictures(module, data, cfg.pictures, RunFolder(run).pictures, device)
        write_text(RunFolder(run).summary, json.dumps(summary, indent=1))
        _table(summary, run)
        _to_wandb(trainer, values)
    return summary


def _to_wandb(trainer: L.Trainer, values: dict[str, float]) -> None:
    """The final numbers as W&B's summary, and as a table of metrics and splits."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(values)
            rows = [[*name.split("/", 1), value] for name, value in values.items()]
            logger.log_table("AP", columns=["split", "metric", "value"], data=rows)


def _load_best(trainer: L.Trainer, module: Distiller) -> str | None:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "best_model_path", "")
    if not path:
        return None
    state = load_tensors(Path(path))["state_dict"]
    own = {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
    module.student.load_state_dict(own, strict=True)
    return str(path)


def _pictures(module: Distiller, data: DetectionData, count: int, folder: Path, device: torch.device) -> None:
    shown = min(count, len(data.ground_truth("val")["images"]))
    batch = data.batch("val", range(shown)).to(device)
    columns = look(module, batch)
    for number, image in enumerate(crop(batch)):
        found = {name: column[number] for name, column in columns.items()}
        save_panel(folder / f"{batch.ids[number]}.png", panel(image, found, data.classes))


def _parameters(module: Distiller) -> dict[str, int]:
    counts = {"student": module.student.parameters_count}
    if module.teacher is not None:
        counts["teacher"] = module.teacher.detector.parameters_count
    return counts


def _table(summary: dict[str, Any], run: Path) -> None:
    values = summary["student"]
    columns = [name for name in COLUMNS if f"val/{name}" in values]
    table = Table(title="validation and test, percent", title_justify="left")
    for name in ("", "split", *columns, "parameters"):
        table.add_column(name, justify="left" if name in ("", "split") else "right", overflow="fold")
    known = {"teacher": (summary["teacher"] or {}).get("values") or {}, "student": values}
    for who, measured in known.items():
        for split in ("val", "test"):
            if f"{split}/AP" in measured or f"{split}/mAP" in measured:
                cells = [_percent(measured.get(f"{split}/{name}", -1.0)) for name in columns]
                table.add_row(who, split, *cells, f"{summary['parameters'][who] / 1e6:.2f} M")
    console = Console()
    console.print(table)
    files = RunFolder(run)
    for what, where in (("student", files.student), ("pictures", files.pictures), ("all numbers", files.summary)):
        console.print(f"{what:12} {where}", markup=False, highlight=False, soft_wrap=True)


def _percent(value: float) -> str:
    """-1 is the metrics' word for: no ground truth of this kind."""
    return f"{100 * value:.1f}" if value >= 0 else "–"


def close_loggers(trainer: L.Trainer, failed: bool) -> None:
    """Let every logger write its last lines; W&B learns how the run ended."""
    for logger in trainer.loggers:
        # One that could not begin cannot end either; the failure itself is what is told.
        with suppress(Exception) if failed else nullcontext():
            logger.finalize("failed" if failed else "success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(failed))


def _versions() -> dict[str, str]:
    packages = ("distill", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "pycocotools")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _git() -> str | None:
    """The checkout's commit; None for an installed package."""
    if not (Path(__file__).parents[3] / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
