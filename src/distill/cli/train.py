"""The verb train, told in order: compose, check, build, teach, fit, test, export, report."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cli import config, gate
from distill.types import DistillError

if TYPE_CHECKING:
    import lightning as L

    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector
    from distill.losses.base import DistillLoss
    from distill.module import Distiller
    from distill.types import Facts


PASSING = ("ckpt_path", "hydra.", "schedule.epochs", "trainer", "logger", "paths.", "pictures", "data.workers")
"""Beginnings of the overrides that may change when a run goes on."""


def main(argv: Sequence[str]) -> int:
    """Hydra's own flags work too: ``--help``, ``--cfg job --resolve``, ``-m``, ``-sc install=bash``."""
    from hydra._internal.utils import _run_hydra, get_args_parser

    config.register_resolvers()
    parser = get_args_parser()
    args = parser.parse_args(list(argv))
    config.check_flags(args)
    if not (args.help or args.hydra_help or args.shell_completion):
        config.check(args.overrides)
    args.overrides = _resumed(args.overrides)
    # Hydra prints and exits by itself unless this is set; the messages are ours, one level up.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    home = str(config.folder())
    try:
        with gate.gated():
            _run_hydra(args, parser, task_function=train, config_path=home, config_name=config.NAME)
    except (HydraException, OmegaConfBaseException) as error:
        raise DistillError(str(error)) from error
    return 0


def train(cfg: DictConfig) -> float:
    """One run. Returns the metric that the configuration names, for sweeps and tuners."""
    import lightning as L

    from distill.cli import report

    started = time.monotonic()
    quieten()
    if HydraConfig.get().mode == RunMode.MULTIRUN and cfg.trainer.devices != 1:
        raise DistillError(
            f"a sweep (-m) with trainer.devices={cfg.trainer.devices}: each process would start the sweep anew, and they "
            "would train different settings together. Start the jobs one by one, or sweep on one device"
        )
    if not isinstance(cfg.seed, int):
        raise DistillError(f"seed={cfg.seed}: expected a whole number")
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    run = Path(HydraConfig.get().runtime.output_dir)
    checkpoint = resume_from(cfg, run)
    report.keep_metrics(run)
    report.write_config(run, cfg, HydraConfig.get().overrides.task)
    data = config.build(cfg.data)
    data.setup("fit")
    tested = cfg.test and data.has("test") and _readable(data)
    check_metric(cfg, data)  # before a teacher is trained for it
    module = assemble(cfg, data)
    trainer = build_trainer(cfg, run)
    report.opening(module, data, run)
    report.log_config(trainer, cfg)
    failed = True
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        summary = report.closing(cfg, trainer, module, data, run, started, tested)
        failed = False
    except SystemExit:  # Lightning's way out of an interrupt
        raise KeyboardInterrupt from None
    finally:
        report.close_loggers(trainer, failed)
    return float(summary["student"][cfg.metric])


def resume_from(cfg: DictConfig, run: Path) -> Path | None:
    """The checkpoint that ``ckpt_path`` means, if any."""
    from distill.detectors.checkpoints import unpickled

    if cfg.ckpt_path is None:
        return None
    file = run / "checkpoints" / "last.ckpt" if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if not file.is_file():
        raise DistillError(
            f"ckpt_path={cfg.ckpt_path}: there is no file {file}. Give ckpt_path=FILE, or hydra.run.dir=RUN ckpt_path=last with "
            "the folder of a run that has checkpoints"
        )
    unpickled(file)  # says what is wrong with a file that Lightning would only fall over
    return file


def quieten() -> None:
    """Leave out what Lightning says on every run and nobody can act on; its warnings about real troubles stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    idle = (
        "treespec, LeafSpec",
        "is not empty",
        "smaller than the logging interval",
        "have many workers",
        "broadcast_buffers. is deprecated",  # its successor does not exist in the oldest torch that we support
        "recommended to use .self.log",  # our metrics are equal on all ranks already
    )
    for words in idle:
        warnings.filterwarnings("ignore", f".*{words}.*")


def assemble(cfg: DictConfig, data: DetectionData) -> Distiller:
    """Student, teacher and losses of a configuration, for this data."""
    from lightning.pytorch.utilities.seed import isolate_rng

    from distill.cli import teacher
    from distill.detectors.inherit import inherit
    from distill.module import Distiller

    min_size, max_size = data.input_size
    student = config.build(cfg.model, classes=list(data.classes), min_size=min_size, max_size=max_size)
    check_masks(cfg, student, data)
    guest: Any = None
    losses: dict[str, DistillLoss] = {}
    if cfg.init not in ("scratch", "inherit"):
        raise DistillError(f"init: expected scratch or inherit, got '{cfg.init}'")
    if cfg.distill.losses or cfg.init == "inherit":
        # The student must start, and the steps must draw, as they would without a teacher.
        with isolate_rng():
            needed = cfg.init == "inherit" or needs_teacher(cfg)
            if needed and (cfg.teacher or {}).get("weights") is None:
                # A pair that cannot be is named before a teacher is trained for it.
                build_losses(cfg, student.facts, teacher.planned(cfg, data.classes))
            guest = teacher.find(cfg, data) if needed else None
            losses = build_losses(cfg, student.facts, guest.facts if guest else None)
            if cfg.init == "inherit":
                student.report += inherit(student, guest.detector)
    return Distiller(
        student,
        guest,
        losses,
        schedule=config.build(cfg.schedule),
        supervised=config.plain(cfg.supervised),
        metrics=build_metrics(cfg),
        seed=cfg.seed,
    )


def needs_teacher(cfg: DictConfig) -> bool:
    """Whether any loss is taught by a detector. If none is, ``teacher`` is left alone, as by distill=none."""
    return any(config.target(node).needs_teacher for node in config.parts(cfg.distill.losses).values())


def build_losses(cfg: DictConfig, student: Facts, teacher: Facts | None) -> dict[str, DistillLoss]:
    """The distillation losses by name, for this pair."""
    nodes = config.parts(cfg.distill.losses).items()
    return {name: config.build(node, student=student, teacher=teacher) for name, node in nodes}


def check_masks(cfg: DictConfig, student: Detector, data: DetectionData) -> None:
    """Refuse a student that learns from masks where the data gives none, and to choose the best of one without by them."""
    if student.masks and not data.masks:
        raise DistillError(
            f"the student is a {student.facts.family}, which learns from instance masks, but data.masks=false: add "
            "data.masks=true (data=coco and data=shapes have masks), or choose a model without masks"
        )
    if "/mask_" in cfg.metric and not student.masks:
        raise DistillError(
            f"metric={cfg.metric} measures masks, but the student, a {student.facts.family}, finds none: set metric=val/AP, "
            "or choose a model with masks (model=mask_rcnn_r50)"
        )


def _readable(data: DetectionData) -> bool:
    """Whether the test split can be measured: a bad one is said now, and is no reason not to train."""
    try:
        data.setup("test")
    except DistillError as error:
        warnings.warn(f"the test split is left out: {error}", stacklevel=2)
        return False
    return True


def check_metric(cfg: DictConfig, data: DetectionData) -> None:
    """Refuse a metric that validation will not measure; its names are those that finding nothing gives."""
    known: list[str] = []
    for make in build_metrics(cfg):
        metric = make(data.ground_truth("val"), data.classes)
        metric.update((), ())
        known += [f"val/{name}" for name in metric.compute()]
    if cfg.metric not in known:
        raise DistillError(f"metric={cfg.metric} is not among the measured values{config.nearest(cfg.metric, known)}")


def build_metrics(cfg: DictConfig) -> list[Any]:
    """The metrics' constructors; a metric set to null is left out."""
    return [config.build(node) for node in config.parts(cfg.metrics).values()]


def build_trainer(cfg: DictConfig, run: Path) -> L.Trainer:
    """Lightning's trainer with the run's callbacks and loggers; CSV is among them, whatever was chosen."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import CSVLogger

    precision = cfg.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "32-true"
    callbacks = [config.build(node) for node in config.parts(cfg.callbacks).values()]
    loggers = [config.build(node) for node in config.parts(cfg.logger).values()]
    if "csv" not in cfg.logger:
        loggers.append(CSVLogger(run, name="", version="", flush_logs_every_n_steps=100))
    try:
        trainer: L.Trainer = config.build(
            cfg.trainer,
            precision=precision,
            callbacks=callbacks,
            logger=loggers,
            enable_progress_bar=cfg.trainer.enable_progress_bar and cfg.callbacks.get("progress") is not None,
        )
    except MisconfigurationException as error:
        raise DistillError(f"trainer: {error}. Choose another one: trainer=auto takes what there is") from error
    return trainer


def _resumed(overrides: Sequence[str]) -> list[str]:
    """``ckpt_path=last`` goes on in the newest run that these overrides made, unless a folder is given."""
    lines = list(overrides)
    if "ckpt_path=last" not in lines or any(line.startswith("hydra.run.dir=") for line in lines):
        return lines
    home = config.named(lines)
    found = sorted(home.glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
    runs = [file.parents[1] for file in found]
    for run in runs:
        if _meant(_words(run)) == _meant(lines):
            return [*lines, f"hydra.run.dir='{run}'"]
    newest = f"the newest, {runs[0]}, was made by: {' '.join(_words(runs[0]))}" if runs else "none has a checkpoint"
    raise DistillError(
        f"ckpt_path=last: no run below {home} was made by these very overrides; {newest}. Repeat the overrides of the run "
        "that is to go on, or name it: hydra.run.dir=RUN, or ckpt_path=FILE"
    )


def _words(run: Path) -> list[str]:
    file = run / "overrides.yaml"
    return [str(line) for line in OmegaConf.load(file)] if file.is_file() else []


def _meant(overrides: Sequence[str]) -> set[str]:
    """The overrides that say which run it is: not how long, on what machine, or what is logged."""
    return {line for line in overrides if not line.lstrip("+~").startswith(PASSING)}
