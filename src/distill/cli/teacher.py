"""Finds the teacher of a run, or starts the run that makes it: a teacher is a finished run of ``distill=none``."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import BaseFileLock, FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.cli.compose import build, composed, parse, parts, plain, quoted
from distill.cli.resume import HANDLING
from distill.cli.signals import Terminated, ended
from distill.files import read_json
from distill.run_folder import STUDENT, RunFolder
from distill.types import DetectorSpec, DistillError

if TYPE_CHECKING:
    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector
    from distill.teacher import Teacher

# What a teacher's run takes over from the student's run: the data, the machine and the recipe, not the student.
KEPT_GROUPS = ("data", "trainer", "experiment", "paths", "trust")
# On one machine: nobody starts the others.
KEPT_TRAINER = ("accelerator", "devices", "strategy", "precision", "save_every")
# Keys that cannot change what a teacher learns, so two runs that differ only here share one teacher.
IGNORED_DATA = (*HANDLING, "on_overlap")
IGNORED_MODEL = ("box_roi_align",)  # the order of the same additions
IGNORED_CALLBACKS = ("terms",)  # it looks at distillation terms, and a teacher's run has none
# What of Lightning's trainer decides the weights: not the machine, not the logging.
TRAINER = ("precision", "max_steps", "max_time", "limit_train_batches", "overfit_batches")
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop."""
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_",
    "LOCAL_",
    "SLURM_",
    "TORCHELASTIC_",
    "PL_",
)


def planned(cfg: DictConfig, classes: Sequence[str]) -> DetectorSpec:
    """DetectorSpec of the teacher that ``teacher.model`` describes, which may yet have to be trained. No weight takes memory.

    Raises:
        DistillError: there is no teacher, or its options do not fit together.
    """
    import torch

    check(cfg)
    with torch.device("meta"):
        detector = build(cfg.teacher.model, classes=list(classes), weights=None, backbone_weights=None)
    facts: DetectorSpec = detector.spec
    return facts


def described(cfg: DictConfig) -> bool:
    """Whether there is a teacher: an experiment's words on one that was then taken away are none."""
    model = cfg.teacher.get("model") if isinstance(cfg.teacher, DictConfig) else None
    return isinstance(model, DictConfig) and "_target_" in model


def check(cfg: DictConfig) -> None:
    """Refuse a configuration without a teacher.

    Raises:
        DistillError: there is none.
    """
    if not described(cfg):
        who = f"distillation losses {list(parts(cfg.distill.losses))}" if cfg.distill.losses else "init=inherit"
        raise DistillError(
            f"{who} cannot do without a teacher: choose teacher=MODEL, or give the student a line in conf/teachers.yaml"
        )


def find(cfg: DictConfig, data: DetectionData) -> Teacher:
    """The guest that ``teacher=`` names: a run folder, a file, an enum, or the cached teacher, trained if need be.

    Args:
        cfg: the run's configuration.
        data: names the classes for a plain weights file that does not list its own, and tells whether what a run
            measured of its student holds here.

    Raises:
        DistillError: nothing is named and nothing is cached under ``teacher.train=never``, or the weights do not fit.
    """
    from distill.detectors.registry import load_detector

    check(cfg)
    if cfg.teacher.weights is None:
        if cfg.model.get("backbone_weights") and not cfg.teacher.model.get("backbone_weights"):
            warnings.warn(
                f"the student's backbone starts from {cfg.model.backbone_weights}, its teacher's from random weights: set "
                "teacher.model.backbone_weights too, or start=imagenet for both",
                stacklevel=2,
            )
        run = cached(cfg)
        return guest(cfg, load_detector(run), str(run), _measured(str(run), cfg, data))
    source = str(cfg.teacher.weights)
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser().absolute())  # for those who look for it later, from elsewhere
    return guest(cfg, load(cfg, source, data.classes), source, _measured(source, cfg, data))


def guest(cfg: DictConfig, detector: Detector, source: str, values: Mapping[str, float] | None = None) -> Teacher:
    """A detector as this run's teacher, made as cheap as ``teacher.fold``, ``channels_last`` and ``dtype`` say."""
    from distill.teacher import Teacher

    cheap = {name: cfg.teacher[name] for name in ("fold", "channels_last", "dtype")}
    return Teacher(detector, source, values, **cheap)


def load(cfg: DictConfig, source: str, classes: Sequence[str]) -> Any:
    """A teacher from a run folder or exported student, which describe themselves, from plain weights or an enum."""
    from distill.detectors.registry import load_detector

    path = Path(source).expanduser()
    if path.is_dir() or path.with_suffix(".json").is_file():
        return load_detector(path)
    # torchvision's names know their own classes, a bare file does not. Frozen norms are what evaluation mode computes.
    names = list(classes) if path.is_file() else None
    return build(cfg.teacher.model, classes=names, weights=source, norm="frozen")


def cached(cfg: DictConfig) -> Path:
    """The folder of the finished teacher run that fits this run; rank 0 trains it where it is missing."""
    folder, overrides = place(cfg)
    if RunFolder(folder).finished:
        return folder
    command = [sys.executable, "-m", "distill", "train", *overrides, f"hydra.run.dir={quoted(str(folder))}"]
    if cfg.teacher.train == "never":
        raise DistillError(
            f"there is no trained teacher at {folder} and teacher.train=never. Name one with teacher.weights=…, or "
            f"make it with:\n  {shlex.join(command)}"
        )
    if _rank() != 0:
        return _wait(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock") as lock:
        if not RunFolder(folder).finished:
            _train(command, folder, lock)
    return folder


def place(cfg: DictConfig) -> tuple[Path, list[str]]:
    """Where the teacher of this run is cached, or will be, and the overrides of the run that makes it."""
    overrides = run_overrides(cfg)
    return Path(cfg.paths.teachers).absolute() / f"{_option()}-{_key(overrides)}", overrides


def run_overrides(cfg: DictConfig) -> list[str]:
    """Overrides of the run that makes this teacher: the student's, less what concerns the student alone."""
    kept: list[str] = []
    for override in parse(HydraConfig.get().overrides.task):
        key, line = override.key_or_group, str(override.input_line)
        group, _, rest = key.partition(".")
        if group in KEPT_GROUPS and (group != "trainer" or not rest or rest.split(".")[0] in KEPT_TRAINER):
            kept.append(line)
    for override in parse(cfg.teacher.run):  # a file may have said this, and it becomes a command line
        if override.is_hydra_override() or override.key_or_group == "trust":
            raise DistillError(f"teacher.run: '{override.input_line}' may not be said here; remove it")
    lines = [
        *kept,
        f"model={_option()}",
        "distill=none",
        "teacher=none",
        "trainer.num_nodes=1",
        f"seed={cfg.teacher.seed}",
    ]
    return [*lines, *_model(cfg, lines), *cfg.teacher.run]


def _model(cfg: DictConfig, lines: Sequence[str]) -> list[str]:
    """Overrides that make these lines' model the one that ``teacher.model`` says, whatever an experiment says of its own
    student's.
    """
    given, wanted = plain(composed([*lines, "hydra.run.dir=."]).model), plain(cfg.teacher.model)
    gone = [f"~model.{key}" for key in given if key not in wanted]
    added = [f"+model.{key}={json.dumps(value)}" for key, value in wanted.items() if key not in given]
    changed = [f"model.{key}={json.dumps(wanted[key])}" for key in given if wanted.get(key, given[key]) != given[key]]
    return [*gone, *added, *changed]


def _option() -> str:
    return str(HydraConfig.get().runtime.choices["model@teacher.model"])


def _key(overrides: Sequence[str]) -> str:
    made_by = composed([*overrides, "hydra.run.dir=."])
    data = {name: value for name, value in plain(made_by.data).items() if name not in IGNORED_DATA}
    model = {name: value for name, value in plain(made_by.model).items() if name not in IGNORED_MODEL}
    facts = {"data": data, "model": model, "schedule": plain(made_by.schedule), "seed": made_by.seed}
    facts |= {"supervised": plain(made_by.supervised), "init": made_by.init}
    # Not resolved: what callbacks write goes into each run's own folder.
    callbacks: Any = OmegaConf.to_container(made_by.callbacks)
    facts["callbacks"] = {name: node for name, node in callbacks.items() if name not in IGNORED_CALLBACKS}
    facts["trainer"] = {name: made_by.trainer.get(name) for name in TRAINER}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def measure(cfg: DictConfig, data: DetectionData, splits: Sequence[str]) -> dict[str, Any]:
    """By what a run's numbers were measured: fingerprints of its splits, and its metrics. Kept in ``summary.json``."""
    return {"metrics": plain(cfg.metrics), "data": {split: data.fingerprint(split) for split in splits}}


def summary(source: str) -> dict[str, Any]:
    """The ``summary.json`` of the run that a teacher comes from, a folder or its ``student.pt``; nothing where it is no run's.

    Raises:
        DistillError: it does not hold what a run measures.
    """
    path = Path(source)
    file = RunFolder(path.parent if path.stem == Path(STUDENT).stem else path).summary
    if not file.is_file():
        return {}
    found = read_json(file)
    before = found["measured"] = found.get("measured") or {"metrics": None, "data": {}}
    values, data = found.get("student"), before.get("data") if isinstance(before, dict) else None
    if not isinstance(data, dict) or not isinstance(values, dict):
        raise DistillError(f"{file}: expected what the run measured under 'student' and 'measured'")
    return found


def _measured(source: str, cfg: DictConfig, data: DetectionData) -> dict[str, float]:
    """What a finished run measured of its student, where images and metrics are the same here; else nothing."""
    found = summary(source)
    if not found:
        return {}
    before, values = found["measured"], found["student"]
    if before.get("metrics") != json.loads(json.dumps(plain(cfg.metrics))):
        return {}
    same = []
    for split, fingerprint in before["data"].items():
        with suppress(DistillError):  # a split that cannot be read here
            same += [split] * (data.has(split) and data.fingerprint(split) == fingerprint)
    return {name: value for name, value in values.items() if name.split("/")[0] in same}


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))


def _train(command: list[str], folder: Path, lock: BaseFileLock) -> None:
    if RunFolder(folder).resumable:
        command = [*command, "ckpt_path=last"]
    print(f"distill: no teacher is cached; training one first:\n  {shlex.join(command[1:])}", flush=True)
    # Its own process, so that neither its random state nor its memory reaches this run.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}
    # It holds the lock as well: if this run is killed, the teacher's goes on, and nobody else may write into its folder.
    held = [fd for fd in (lock._context.lock_file_fd,) if fd is not None]
    with subprocess.Popen(command, env=alone, pass_fds=held) as process:
        code = ended(process)
    if code in STOPPED:
        raise Terminated
    if code or not RunFolder(folder).finished:
        raise DistillError(
            f"the teacher's run failed with exit code {code}; its files are in {folder}. Run it by hand:\n"
            f"  {shlex.join(command)}"
        )


def _wait(folder: Path, patience: float = 24 * 3600) -> Path:
    start = time.monotonic()
    while not RunFolder(folder).finished:
        if time.monotonic() - start > patience:
            raise DistillError(
                f"rank {_rank()} waited {patience / 3600:.0f} h for rank 0 to train the teacher in {folder}"
            )
        time.sleep(2)
    return folder
