"""The verb train, told in order: compose, check, build, teach, fit, test, export, report."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli import compose, resume, sweep, validate
from distill.cli.presets import register_presets
from distill.cli.signals import Terminated
from distill.cli.suggestions import nearest
from distill.types import DistillError

if TYPE_CHECKING:
    import lightning as L

    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector
    from distill.losses.base import DistillLoss
    from distill.training.distiller import Distiller
    from distill.types import DetectorSpec


def main(argv: Sequence[str]) -> int:
    """Hydra's own flags work too: ``--help``, ``--cfg job --resolve``, ``-m``, ``-sc install=bash``."""
    from hydra._internal.utils import _run_hydra, get_args_parser

    compose.register_resolvers()
    register_presets(compose.folder())
    parser = get_args_parser()
    args = parser.parse_args(list(argv))
    compose.check_flags(args)
    if not args.shell_completion:
        compose.check(args.overrides)
    if not args.multirun:
        args.overrides = resume.resumed(args.overrides)
    elif any(word.startswith("ckpt_path=") for word in args.overrides):
        raise DistillError("ckpt_path with -m: a sweep goes on by itself where it stopped: hydra.sweep.dir=DIR")
    else:
        args.overrides = resume.swept(args.overrides)
    # Hydra prints and exits by itself unless this is set; the messages are ours, one level up.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    home, jobs = str(compose.folder()), sweep.Jobs()
    refused: list[DistillError] = []

    def task(cfg: DictConfig) -> float:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return jobs.run(cfg)
        try:
            return train(cfg)
        except DistillError as error:  # past Hydra, which would print all overrides in front of it
            refused.append(error)
            return float("nan")

    try:
        _run_hydra(args, parser, task_function=task, config_path=home, config_name=compose.NAME)
    except (HydraException, OmegaConfBaseException) as error:
        missing = '; its sweeper is an extra: install "distill[optuna]"' if "sweeper/optuna" in str(error) else ""
        told = str(error).partition("Config search path")[0].strip()
        raise DistillError(f"{told}{missing}") from error
    except sweep.JobFailed as error:
        raise DistillError(f"{len(jobs.failed)} of the sweep's jobs failed, the first: {error}") from None
    except (Terminated, KeyboardInterrupt) as stopped:
        raise type(stopped)(*(stopped.args or jobs.going_on())) from None
    finally:
        jobs.show()
    if refused:
        raise refused[0]
    return 0


def train(cfg: DictConfig) -> float:
    """One run. Returns the metric that the configuration names, for sweeps and tuners."""
    run = Path(HydraConfig.get().runtime.output_dir)
    try:
        return _train(cfg, run)
    except (Terminated, KeyboardInterrupt) as stopped:
        raise type(stopped)(resume.going_on(run)) from None


def _train(cfg: DictConfig, run: Path) -> float:
    import lightning as L
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from distill.cli import report

    started = time.monotonic()
    quieten()
    validate.check(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = resume.checkpoint(cfg, run)
    resume.check_config(cfg, checkpoint)
    trainer = check_parts(cfg, run)  # and whether this machine has what it asks for
    data = compose.build(cfg.data)
    data.setup("fit")
    resume.check_data(cfg, checkpoint, data)
    report.write_config(run, cfg, HydraConfig.get().overrides.task)
    tested = cfg.test and data.has("test") and _readable(data)
    check_metric(cfg, data)  # before a teacher is trained for it
    module = assemble(cfg, data)
    report.keep_metrics(run)
    report.opening(module, data, run)
    failed = True
    try:
        report.open_loggers(trainer, cfg)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        summary = report.closing(cfg, trainer, module, data, run, started, tested)
        failed = False
    except (SIGTERMException, Terminated):
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the other processes, where this one alone was told
        raise Terminated from None
    except SystemExit:  # Lightning's way out of an interrupt
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        raise _explained(error, trainer.global_rank) from error
    finally:
        report.close_loggers(trainer, failed)
    return float(summary["student"][cfg.metric])


def _explained(error: RuntimeError, rank: int) -> Exception:
    """A failure that its own words do not explain."""
    from distill.training.callbacks import consistency

    text = str(error)
    if consistency.lost(error):
        return DistillError(
            f"rank {rank}: another process of this run is gone or does not answer (it is waited for as long as "
            f"trainer.strategy.timeout says). Its own message says why: {text.splitlines()[0]}"
        )
    if "DataLoader worker" in text or "Pin memory thread" in text:
        return DistillError(
            f"a loader process died: {text.splitlines()[0]} Most often memory ran out: lower data.workers, data.prefetch or "
            "data.batch_size, or set data.workers=0 to see the cause. ckpt_path=last goes on from the last checkpoint"
        )
    if "loading state_dict" in text:
        return DistillError(f"resume: the checkpoint's weights do not fit this run's models: {text}")
    return error


def agreed(cfg: DictConfig, data: DetectionData) -> dict[str, str]:
    """What must be equal on all processes: the resolved configuration, less paths, which hold times, and the data."""
    same = cfg.copy()
    for name in same.paths:
        same.paths[name] = str(name)
    return {name: str(value) for name, value in resume.leaves({**compose.plain(same), "data seen": data.state_dict()})}


def quieten() -> None:
    """Leave out what Lightning says on every run and nobody can act on; its warnings about real troubles stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    idle = (
        "treespec, LeafSpec",
        "is not empty",
        "smaller than the logging interval",
        "have many workers",
        "broadcast_buffers. is deprecated",  # its successor does not exist in the oldest torch that we support
        "could not find the monitored key",  # schedule.steps may end inside an epoch, before anything was measured
        "recommended to use .self.log",  # our metrics are equal on all ranks already
    )
    for words in idle:
        warnings.filterwarnings("ignore", f".*{words}.*")


def check_parts(cfg: DictConfig, run: Path) -> L.Trainer:
    """Build all that knows neither data nor models, so that a mistake there is named before an image is read or a teacher
    trained. The trainer is the run's.
    """
    compose.build(cfg.schedule)
    compose.build(cfg.guard)
    build_metrics(cfg)
    return build_trainer(cfg, run)


def assemble(cfg: DictConfig, data: DetectionData) -> Distiller:
    """Student, teacher and losses of a configuration, for this data."""
    from lightning.pytorch.utilities.seed import isolate_rng

    from distill.cli import teacher
    from distill.detectors.inherit import inherit
    from distill.training.distiller import Distiller
    from distill.training.schedule import channels_last

    min_size, max_size = data.input_size
    student = compose.build(cfg.model, classes=list(data.classes), min_size=min_size, max_size=max_size)
    check_masks(cfg, student, data)
    guest: Any = None
    losses: dict[str, DistillLoss] = {}
    if cfg.distill.losses or cfg.init == "inherit":
        # The student must start, and the steps must draw, as they would without a teacher.
        with isolate_rng():
            needed = cfg.init == "inherit" or needs_teacher(cfg)
            if needed:
                teacher.check(cfg)
            if needed and cfg.teacher.weights is None:
                # A pair that cannot be is named before a teacher is trained for it.
                build_losses(cfg, student.spec, teacher.planned(cfg, data.classes))
            guest = teacher.find(cfg, data) if needed else None
            losses = build_losses(cfg, student.spec, guest.spec if guest else None)
            if cfg.init == "inherit":
                student.report += inherit(student, guest.detector)
    module = Distiller(
        student,
        guest,
        losses,
        schedule=compose.build(cfg.schedule),
        supervised=compose.plain(cfg.supervised),
        metrics=build_metrics(cfg),
        seed=cfg.seed,
        guard=compose.build(cfg.guard),
    )
    if cfg.channels_last:
        channels_last(module)  # adapters too: what one layout hands the other would be laid out anew in every step
    return module


def needs_teacher(cfg: DictConfig) -> bool:
    """Whether any loss is taught by a detector. If none is, ``teacher`` is left alone, as by distill=none."""
    return any(kind.needs_teacher for kind, _ in _losses(cfg).values())


def build_losses(cfg: DictConfig, student: DetectorSpec, teacher: DetectorSpec | None) -> dict[str, DistillLoss]:
    """The distillation losses by name, for this pair."""
    return {name: compose.build(node, student=student, teacher=teacher) for name, (_, node) in _losses(cfg).items()}


def _losses(cfg: DictConfig) -> dict[str, tuple[type[DistillLoss], Any]]:
    """Class and node of each loss by name."""
    from distill.losses.base import DistillLoss

    found = {name: (compose.target(node), node) for name, node in compose.parts(cfg.distill.losses).items()}
    for name, (kind, node) in found.items():
        if not (isinstance(kind, type) and issubclass(kind, DistillLoss)):
            raise DistillError(f"distill.losses.{name}: expected a DistillLoss, got {node.get('_target_')}")
    return found


def check_masks(cfg: DictConfig, student: Detector, data: DetectionData) -> None:
    """Refuse a student that learns from masks where the data gives none, and to choose the best of one without by them."""
    if "mask_logits" in student.spec.outputs and not data.masks:
        raise DistillError(
            f"the student is a {student.spec.family}, which learns from instance masks, but data.masks=false: add "
            "data.masks=true (data=coco and data=shapes have masks), or choose a model without masks"
        )
    if "/mask_" in cfg.metric and "mask_logits" not in student.spec.outputs:
        raise DistillError(
            f"metric={cfg.metric} measures masks, but the student, a {student.spec.family}, finds none: set metric=val/AP, "
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
    """Refuse a metric that validation will not measure, for a sweep or for a callback to watch, and two that measure the same;
    the names are those that finding nothing gives.
    """
    known: list[str] = []
    for make in build_metrics(cfg):
        metric = make(data.ground_truth("val"), data.classes)
        metric.update((), ())
        names = [f"val/{name}" for name in metric.compute()]
        twice = [name for name in names if name in known]
        if twice:
            raise DistillError(f"metrics: {list(cfg.metrics)} give {twice[0]} twice: set one of them to null")
        known += names
    watched = {f"callbacks.{name}.monitor": node.get("monitor") for name, node in compose.parts(cfg.callbacks).items()}
    for key, name in {"metric": cfg.metric, **watched}.items():
        measured = key == "metric" or str(name).startswith("val/")  # a callback may watch a loss term
        if measured and name not in known:
            raise DistillError(f"{key}={name} is not among the measured values{nearest(str(name), known)}")


def build_metrics(cfg: DictConfig) -> list[Any]:
    """The metrics' constructors; a metric set to null is left out."""
    return [compose.build(node) for node in compose.parts(cfg.metrics).values()]


def build_trainer(cfg: DictConfig, run: Path) -> L.Trainer:
    """Lightning's trainer with the run's callbacks and loggers; CSV is among them, whatever was chosen."""
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.loggers import CSVLogger, Logger

    from distill.precision import chosen
    from distill.training.callbacks.checkpoint_files import CheckpointFiles
    from distill.training.callbacks.checkpoints import RestoreSignalHandlers
    from distill.training.callbacks.consistency import ConsistencyCheck
    from distill.training.callbacks.provenance import Provenance

    precision = chosen(cfg.trainer.precision, compose.device(cfg).type == "cuda")
    bars = cfg.trainer.enable_progress_bar
    wanted = [each for each in _built(cfg, "callbacks", L.Callback) if bars or not isinstance(each, ProgressBar)]
    callbacks = [
        RestoreSignalHandlers(),
        ConsistencyCheck(partial(agreed, cfg)),
        *wanted,
        Provenance(compose.plain(cfg)),
    ]
    settings = {name: value for name, value in compose.plain(cfg.trainer).items() if name != "save_every"}
    loggers = _built(cfg, "logger", Logger)
    if "csv" not in cfg.logger:
        loggers.append(CSVLogger(run, name="", version="", flush_logs_every_n_steps=100))
    try:
        trainer: L.Trainer = compose.build(
            settings,
            precision=precision,
            callbacks=callbacks,
            plugins=[CheckpointFiles(forget=resume.IDENTITY if cfg.resume == "anyway" else ())],
            logger=loggers,
            enable_progress_bar=bars and cfg.callbacks.get("progress") is not None,
        )
    except MisconfigurationException as error:
        raise DistillError(f"trainer: {error}. Choose another one: trainer=auto takes what there is") from error
    plain = cfg.trainer.strategy
    if trainer.world_size > 1 and isinstance(plain, str) and (plain == "auto" or plain.startswith("ddp")):
        raise DistillError(
            f"trainer.strategy={plain} with {trainer.world_size} processes: Lightning's own settings would copy rank 0's batch norm "
            "statistics to all before each step, and wait half an hour for a process that is gone. Add trainer=ddp (trainer=ddp_cpu "
            f"without GPUs), and trainer.devices={trainer.num_devices} where that is not all of them"
        )
    return trainer


def _built(cfg: DictConfig, group: str, kind: type) -> list[Any]:
    """The objects of a group of Lightning's."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    made = []
    for name, node in compose.parts(cfg[group]).items():
        try:
            made.append(compose.build(node))
        except MisconfigurationException as error:
            raise DistillError(f"{group}.{name}: {error}") from error
        if not isinstance(made[-1], kind):
            raise DistillError(f"{group}.{name}: expected a {kind.__name__} of Lightning's, got {node.get('_target_')}")
    return made
