"""Finds the checkpoint that a run resumes from, and refuses a checkpoint of another run."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distill import plugins
from distill.cli.config import compose, instantiate
from distill.cli.config.overrides import parse_overrides, read_config, read_overrides
from distill.cli.runs.run_lock import is_locked
from distill.cli.signals import RESTART_ADVICE
from distill.cli.tables import print_line
from distill.files import write_text
from distill.quoting import quote_value
from distill.run_folder import OVERRIDES, RunFolder, previous_checkpoint
from distill.type_checks import leaves
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.data.datamodule import DetectionData

LOADING_KEYS = ("workers", "prefetch", "persistent_workers", "pin_memory", "cache", "eval_batch_size")
"""Keys of ``data`` that change how images are loaded, but not which images."""
UNFINISHED = "ckpt_path=unfinished"
"""Word of ``train`` that resumes a stopped run of the same overrides, if there is one."""
OTHER_RUN_PREFIXES = (
    "ckpt_path",
    "resume=",
    "hydra.",
    "schedule.epochs",
    "trainer",
    "logger",
    "paths.",
    "pictures",
    "cost",
    "role",
    "baseline",
    *(f"data.{key}=" for key in LOADING_KEYS),
    "guard",
    "callbacks.terms",
    "callbacks.gradients",
    "trust",
    "config_dirs",
)
"""Prefixes of overrides that do not identify a run."""
MAY_DIFFER = (
    *(
        "ckpt_path",
        "resume",
        "name",
        "test",
        "pictures",
        "cost",
        "role",
        "baseline*",
        "paths.*",
        "logger.*",
        "guard.*",
        "callbacks.terms*",
        "distill.same_place",
        "trust*",
        "config_dirs*",
    ),
    # The machine, saving and the terminal.
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy*", "benchmark", "profiler")),
    *(f"trainer.{key}" for key in ("log_every_n_steps", "enable_*", "default_root_dir", "save_every", "num_sanity*")),
    *("callbacks.last*", "callbacks.teacher*", "callbacks.rate*", "callbacks.panels*", "callbacks.progress*"),
    *("callbacks.history*", "callbacks.lines*", "callbacks.schedule*", "callbacks.gradients*"),
    "callbacks.best.dirpath",
    *(f"data.{key}" for key in LOADING_KEYS),
    # Compared by the checkpoint itself: images and boxes, the teacher's weights. Start weights no longer matter.
    *("data.source*", "data.unlabeled.images", "data.on_*", "distill.losses.*.classifier.weights"),
    *(
        f"teacher.{key}"
        for key in ("weights", "train", "seed", "schedule*", "data*", "run*", "min_ap", "evaluate", "model*")
    ),
    *("init", "model.weights", "model.backbone.weights"),
)
"""Keys that may differ when a run resumes: they do not change the training, or are compared in another way."""
NEW_KEYS = ("data.", "model.", "classes.", "distill.balance")
"""Parts of the configuration whose keys, where they are new in a version, have defaults that change nothing."""
IDENTITY_KEYS = ("made_by", "teacher", "guests", "DetectionData")
"""Entries of a checkpoint that are compared with the run before a resume."""


def add_run_to_resume(overrides: Sequence[str]) -> list[str]:
    """Add the folder of the run that ``ckpt_path=last`` means: by default the newest run of the same overrides.

    ``ckpt_path=unfinished`` means the newest run of the same overrides that has not finished and that no process
    trains. If there is none, the word is removed, so a new run starts.

    A job that SLURM started again resumes without ``ckpt_path=last`` if it has a checkpoint.
    """
    lines = list(overrides)
    if UNFINISHED in lines:
        return _find_unfinished_run([line for line in lines if line != UNFINISHED])
    if _requeued() and not any(line.startswith("ckpt_path=") for line in lines):
        try:
            return _find_run([*lines, "ckpt_path=last"], must=True)
        except DistillError:
            return lines
    return _find_run(lines, must=False)


def requeued_sweep(overrides: Sequence[str]) -> Path | None:
    """The folder of the sweep that SLURM started again, unless a folder is given."""
    if not _requeued() or any(line.startswith("hydra.sweep.dir=") for line in overrides):
        return None
    paths = compose.compose_config([line for line in overrides if line.startswith("paths.outputs=")]).paths
    return next((folder for folder in Path(paths.outputs).glob("sweeps/*") if _made_by_this_job(folder)), None)


def _requeued() -> bool:
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _find_run(lines: list[str], must: bool) -> list[str]:
    if "ckpt_path=last" not in lines:
        return lines
    home = compose.runs_folder(lines)
    if any(override.key_or_group == "hydra.run.dir" for override in parse_overrides(lines)):
        folder = Path(HydraConfig.get().run.dir)
        if must and not RunFolder(folder).resumable:
            raise DistillError(f"no checkpoint in {folder}")
        return lines
    runs = sorted((run for run in home.glob("*") if RunFolder(run).resumable), key=_saved_at, reverse=True)
    for run in runs:
        # A requeued job resumes its own run only: another job may have finished a run of the same overrides.
        if _run_identity(_recorded_words(run)) == _run_identity(lines) and (not must or _made_by_this_job(run)):
            return [*lines, f"hydra.run.dir={quote_value(str(run))}"]
    newest = (
        f"the newest, {runs[0]}, was made by: {' '.join(_recorded_words(runs[0]))}" if runs else "none has a checkpoint"
    )
    raise DistillError(
        f"ckpt_path=last: no run below {home} was made by these very overrides; {newest}. distill resume RUN needs no "
        "overrides: RUN is the folder of the run"
    )


def _find_unfinished_run(lines: list[str]) -> list[str]:
    resuming = [*lines, "ckpt_path=last"]
    home = compose.runs_folder(lines)
    if any(override.key_or_group == "hydra.run.dir" for override in parse_overrides(lines)):
        named = RunFolder(HydraConfig.get().run.dir)
        return resuming if named.resumable and not named.finished else lines
    for run in sorted((run for run in home.glob("*") if RunFolder(run).resumable), key=_saved_at, reverse=True):
        same = _run_identity(_recorded_words(run)) == _run_identity(lines)
        if same and not RunFolder(run).finished and not is_locked(run) and _is_same_configuration(run, lines):
            print_line("resume", f"the stopped run {run}")
            return [*resuming, f"hydra.run.dir={quote_value(str(run))}"]
    return lines


def _is_same_configuration(run: Path, lines: Sequence[str]) -> bool:
    """Whether the overrides of a run have the same meaning today: another version may have other defaults."""
    from distill.cli.config import auto_values

    recorded = read_config(RunFolder(run))
    composed = auto_values.resolve_as_recorded(compose.compose_config(lines), recorded, lines)
    composed.paths = {name: str(name) for name in composed.paths}  # may differ, and exist only inside a run
    return not differences(recorded, instantiate.to_containers(composed))


def write_slurm_job(run: Path) -> None:
    """Write the id of the SLURM job that makes a run or a sweep into its folder."""
    if "SLURM_JOB_ID" in os.environ:
        write_text(RunFolder(run).slurm_job, os.environ["SLURM_JOB_ID"])


def _made_by_this_job(run: Path) -> bool:
    file = RunFolder(run).slurm_job
    return file.is_file() and file.read_text() == os.environ.get("SLURM_JOB_ID")


def resume_advice(run: Path) -> str:
    """Text that says how to resume a stopped run."""
    if not RunFolder(run).resumable:
        return RESTART_ADVICE
    trusted = plugins.trusted_by_command_line()
    words = ["resume", str(run), *([f"trust=[{','.join(trusted)}]"] if trusted else [])]
    return f"{shlex.join(['python', '-m', 'distill', *words])} continues from the last checkpoint"


def _saved_at(run: Path) -> float:
    return max(file.stat().st_mtime for file in RunFolder(run).resumable)


def _recorded_words(run: Path) -> list[str]:
    return read_overrides(run) if RunFolder(run).overrides.is_file() else []


def _run_identity(overrides: Sequence[str]) -> set[str]:
    """The overrides that identify a run: without its length, its machine and its logging."""
    return {line for line in overrides if not line.lstrip("+~").startswith(OTHER_RUN_PREFIXES)}


def find_checkpoint(cfg: DictConfig, run: Path) -> Path | None:
    """The intact checkpoint that ``ckpt_path`` means, or None. If the newest one is damaged, the previous one is taken.

    Raises:
        DistillError: there is no such checkpoint.
    """
    if cfg.resume not in ("same", "anyway"):
        raise DistillError(f"resume: expected same or anyway, got '{cfg.resume}'; distill resume RUN continues a run")
    if cfg.ckpt_path is None:
        return None
    from distill.training.checkpoint_io import latest_intact_checkpoint

    file = RunFolder(run).last if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if not file.is_file() and not previous_checkpoint(file).is_file():
        raise DistillError(
            f"ckpt_path={cfg.ckpt_path}: there is no file {file}. distill resume RUN continues from the last "
            "checkpoint in the folder RUN; ckpt_path=FILE names one checkpoint"
        )
    return latest_intact_checkpoint(file)


def validate_config(cfg: DictConfig, file: Path | None) -> None:
    """Refuse a checkpoint of another configuration, with the keys that differ. ``resume=anyway`` only warns."""
    _refuse_older(file)
    made_by = _read_part(file, "made_by")
    if made_by:
        given = [override.key_or_group for override in parse_overrides(HydraConfig.get().overrides.task)]
        _refuse(cfg.resume, file, differences(made_by["config"], instantiate.to_containers(cfg), given))


def recorded_config(file: Path) -> Mapping[str, Any] | None:
    """The resolved configuration of the run that wrote a checkpoint; None if the checkpoint has none."""
    made_by = _read_part(file, "made_by")
    return made_by["config"] if made_by else None


def _refuse_older(file: Path | None) -> None:
    """Refuse a checkpoint of version 0.1.0, which did not record its version: its configuration has other keys."""
    if file is not None and _read_part(file, "distill_version") is None:
        raise DistillError(
            f"resume: {file} was written by distill 0.1.0, which alone can resume that run: install distill 0.1.0, or "
            "start a new run without ckpt_path"
        )


def validate_data(mode: str, file: Path | None, data: DetectionData) -> None:
    """Refuse a checkpoint of other classes, images or boxes, before a teacher is trained."""
    known = _read_part(file, "DetectionData")
    if known:
        _refuse(mode, file, data.differences(known))


def _read_part(file: Path | None, key: str) -> Any:
    from distill.training.checkpoint_io import read_checkpoint

    return None if file is None else read_checkpoint(file, lazily=True).get(key)


def _refuse(mode: str, file: Path | None, differing: Sequence[str]) -> None:
    if not differing:
        return
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    listed = "; ".join(differing[:8]) + more
    if mode == "anyway":
        warnings.warn(f"resume=anyway: this is not the run that made {file}: {listed}", stacklevel=3)
        return
    raise DistillError(
        f"resume: {file} was made by another run: {listed}. distill resume RUN repeats the overrides of that run "
        f"({OVERRIDES} in its folder); resume=anyway accepts the differences"
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], given: Sequence[str] | None = None) -> list[str]:
    """Lines ``key: value there, value here`` of all keys that differ but must be equal.

    Args:
        before: the configuration of the run that wrote the checkpoint.
        now: the configuration of this run.
        given: keys of this run's overrides. A key of `NEW_KEYS` that is new in this version, and is not given, has
            a default that changes nothing, or the comparison of images and boxes reports the change. None compares all
            keys.
    """
    there, here = dict(leaves(before)), dict(leaves(now))
    keys = [key for key in {**there, **here} if not any(fnmatchcase(key, free) for free in MAY_DIFFER)]
    return [
        f"{key}: {_describe_value(there, key)}, {_describe_value(here, key, 'here')}"
        for key in keys
        if _differ(there, here, key) and not (key not in there and _is_new_key(key, given))
    ]


def _is_new_key(key: str, given: Sequence[str] | None) -> bool:
    return given is not None and key.startswith(NEW_KEYS) and not any(f"{key}.".startswith(f"{x}.") for x in given)


def _differ(there: Mapping[str, Any], here: Mapping[str, Any], key: str) -> bool:
    return (key in there) != (key in here) or there.get(key) != here.get(key)


def _describe_value(values: Mapping[str, Any], key: str, place: str = "there") -> str:
    return f"{values[key]} {place}" if key in values else f"not {place}"
