"""Reads the finished runs of a comparison, with the reason for each folder that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from distill.analysis.configurations import FinishedRun
from distill.cli.config.overrides import configuration_name, read_config, read_overrides
from distill.cli.runs.results import fingerprints, read_finished
from distill.cli.runs.sweep_folder import job_folders
from distill.files import read_json
from distill.run_folder import RunFolder
from distill.training.callbacks.history import read_rows
from distill.types import DistillError

SPLITS = ("val", "test")


def expand_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders of these paths. The folder of a sweep stands for its jobs. Lock files are left out."""
    folders: list[Path] = []
    for path in paths:
        if path.suffix == ".lock" and path.is_file():
            continue
        run = RunFolder(path)
        is_run = run.config.is_file() or run.overrides.is_file() or run.summary.is_file()
        folders += [path] if is_run or not (jobs := job_folders(path)) else jobs
    return list(dict.fromkeys(folders))


def read_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[tuple[Path, str]]]:
    """The finished runs among folders, and the baselines that they name; and the other folders with the reason."""
    runs, left_out = [], []
    waiting = list(folders)
    known = {folder.absolute() for folder in folders}
    for folder in waiting:
        try:
            run = read_run(folder)
        except DistillError as error:
            left_out.append((folder, str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")))
            continue
        runs.append(run)
        if run.baseline is not None and run.baseline.absolute() not in known and run.baseline.is_dir():
            waiting.append(run.baseline)  # read by this loop later
            known.add(run.baseline.absolute())
    return runs, left_out


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        DistillError: the folder holds no run, a file of it is damaged, or see `read_finished`.
    """
    run = RunFolder(folder)
    if not folder.exists():
        raise DistillError(f"{folder}: does not exist. Expected the folder of a run or of a sweep")
    if not folder.is_dir() or not (run.config.is_file() or run.overrides.is_file() or run.summary.is_file()):
        raise DistillError(f"{folder}: not a run: expected the folder of a run or of a sweep")
    summary = read_finished(run)
    values, losses = summary["student"], summary.get("losses")
    if not _is_numbers(values) or not isinstance(losses, list):
        raise DistillError(
            f"{run.summary}: expected numbers under 'student' and names under 'losses', as this version writes them"
        )
    classes = (read_json(run.description).get("model") or {}).get("classes")
    if not isinstance(classes, list):
        raise DistillError(f"{run.description}: expected the student's 'classes'")
    config = read_config(run)
    if not isinstance(config.get("seed"), int):
        raise DistillError(f"{run.config}: expected a 'seed', got {config.get('seed')}")
    seconds, per_step = training_times(run)
    words = read_overrides(folder) if run.overrides.is_file() else []
    return FinishedRun(
        folder=folder,
        config=config,
        words=words,
        losses=[str(name) for name in losses],
        values={name: float(value) for name, value in values.items()},
        classes=[str(name) for name in classes],
        teacher=_teacher(summary.get("teacher")),
        baseline=_baseline_folder(summary.get("baseline")),
        fingerprints=fingerprints(summary),
        detections={split: file for split in SPLITS if (file := run.detections_on(split)).is_file()},
        seconds=seconds,
        seconds_per_step=per_step,
        group=configuration_name(words),
    )


def _baseline_folder(baseline: Any) -> Path | None:
    source = baseline.get("source") if isinstance(baseline, dict) else None
    return Path(source) if isinstance(source, str) else None


def _is_numbers(values: Any) -> TypeGuard[dict[str, float]]:
    return isinstance(values, dict) and all(isinstance(value, (int, float)) for value in values.values())


def _teacher(identity: Any) -> Mapping[str, Any] | None:
    """Source, results, and the duration of the training of a run's teacher, if it is a run that is still there."""
    if not isinstance(identity, dict):
        return None
    teacher: dict[str, Any] = {"source": identity.get("source"), "values": {}}
    if _is_numbers(identity.get("values")):
        teacher["values"] = identity["values"]
    path = Path(str(identity.get("source")))
    teacher["seconds"] = training_times(RunFolder(path if path.is_dir() else path.parent))[0]
    return teacher


def training_times(run: RunFolder) -> tuple[float | None, float | None]:
    """Duration of a training with its evaluations, over all resumes, and of an optimizer step without them, in seconds.

    None where ``metrics.csv`` does not say it. Versions before 0.2 did not tell the time of evaluations apart.
    """
    if not run.metrics.is_file():
        return None, None
    with suppress(KeyError, ValueError, OSError):
        rows = read_rows(run.metrics)
        seconds = sum(float(row["seconds"]) for row in rows)
        if not rows or "evaluation_seconds" not in rows[0]:
            return (seconds if rows else None), None
        evaluating = sum(float(row["evaluation_seconds"] or 0) for row in rows)
        return seconds, (seconds - evaluating) / int(rows[-1]["step"])
    return None, None
