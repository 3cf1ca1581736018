"""Builds the objects of a run from its plan. Train, evaluate, doctor, bench and replay share them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from distill.cli.config import instantiate
from distill.cli.runs.preflight import LossOptions, RunPlan, check_masks, check_squares
from distill.cli.runs.resume import IDENTITY_KEYS
from distill.cli.runs.teacher_cache import find_teacher, planned_teacher
from distill.cli.tables import print_line
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.detectors.inherit import inherit, inherited_tensors
from distill.evaluation.labeling import label_by_teacher
from distill.losses.base import DistillLoss, require_no_truth
from distill.losses.places import shared_places
from distill.teacher import Teacher
from distill.training.callbacks.checkpoints import RestoreSignalHandlers
from distill.training.callbacks.consistency import ConsistencyCheck
from distill.training.callbacks.provenance import Provenance
from distill.training.checkpoint_io import CheckpointFiles
from distill.training.distiller import Distiller
from distill.training.schedule import use_channels_last
from distill.type_checks import leaves
from distill.types import DetectorSpec, DistillError


def build_student(plan: RunPlan, data: DetectionData, **options: Any) -> Detector:
    """The student for this data; `options` replace those of the configuration.

    Raises:
        DistillError: the student and the data do not fit together.
    """
    min_size, max_size = data.input_size
    student = plan.student(classes=list(data.classes), min_size=min_size, max_size=max_size, **options)
    check_masks(plan, student, data)
    check_squares(data, type(student), student.options, "student")
    return student


def assemble(
    plan: RunPlan, data: DetectionData, student: Detector | None = None, teacher: Teacher | None = None
) -> Distiller:
    """Student, teacher and losses of a plan, for this data.

    Args:
        plan: plan of the run.
        data: the data, already read.
        student: an existing student; None builds the configured student.
        teacher: an existing teacher. None finds the configured teacher if the plan needs one, and trains a teacher that
            is not cached.

    Raises:
        DistillError: student, teacher, losses and data do not fit together.
    """
    if student is None:
        student = build_student(plan, data)
    else:
        check_squares(data, type(student), student.options, "student", training=False)
    losses: dict[str, DistillLoss] = {}
    with isolate_rng():  # student weights and random draws equal those of a run without distillation
        if not plan.needs_teacher:
            teacher = None
        elif teacher is None:
            assert plan.teacher is not None  # checked in the preflight
            if plan.teacher.weights is None:  # refuse an impossible pair before the teacher is trained
                planned = planned_teacher(plan.teacher, data.classes)
                check_squares(data, type(planned), planned.options, "teacher")
                check_unlabeled(data, build_losses(plan.losses, student.spec, planned.spec))
                if plan.inherit:
                    inherited_tensors(student, planned)
            teacher = find_teacher(plan.teacher, data)
        if teacher is not None:
            check_squares(data, type(teacher.detector), teacher.detector.options, "teacher")
        losses = build_losses(plan.losses, student.spec, teacher.spec if teacher else None)
        check_unlabeled(data, losses)
        if teacher is not None:
            for line in label_by_teacher(data, teacher):
                rank_zero_only(print_line)("unlabeled", line)
        if plan.warns_of_places:
            _warn_of_shared_places(losses)
        if plan.inherit and teacher:
            student.report += inherit(student, teacher.detector)
    training = (plan.schedule, plan.supervised, plan.metrics, plan.seed, plan.guard, plan.balance)
    module = Distiller(student, teacher, losses, *training)
    if plan.channels_last:
        use_channels_last(module)  # adapters too: mixed layouts would be converted in every step
    return module


def check_unlabeled(data: DetectionData, losses: Mapping[str, DistillLoss]) -> None:
    """Refuse losses that read ground truth, for images without labels and without the teacher's boxes."""
    if data.has_unlabeled and data.unlabeled.boxes is None:
        require_no_truth(losses)


def build_losses(
    losses: Mapping[str, LossOptions], student: DetectorSpec, teacher: DetectorSpec | None
) -> dict[str, DistillLoss]:
    """The distillation losses of a pair, by name."""
    return {name: loss.build(student=student, teacher=teacher) for name, loss in losses.items()}


def _warn_of_shared_places(losses: Mapping[str, DistillLoss]) -> None:
    for place, methods in shared_places({name: loss.weights for name, loss in losses.items()}).items():
        rank_zero_warn(
            f"distill: {' and '.join(methods)} compare the same place ({place}), so their terms may do the same twice "
            "or work against one another. Choose one of them (distill methods lists the places), or set "
            "distill.same_place=allow"
        )


def build_trainer(plan: RunPlan) -> L.Trainer:
    """Lightning's trainer with the run's callbacks and loggers.

    Raises:
        DistillError: Lightning refuses an option.
    """
    options = plan.trainer
    bars = options.settings["enable_progress_bar"]
    callbacks = _build_parts("callbacks", options.callbacks, L.Callback)
    loggers = _build_parts("logger", options.loggers, Logger)
    idle = (*(() if bars else (ProgressBar,)), *(() if loggers else (LearningRateMonitor,)))
    try:
        trainer: L.Trainer = instantiate.build_node(
            dict(options.settings),
            callbacks=[
                RestoreSignalHandlers(),
                ConsistencyCheck(partial(shared_values, options.shared)),
                *(callback for callback in callbacks if not isinstance(callback, idle)),
                Provenance(dict(plan.config)),
            ],
            plugins=[CheckpointFiles(forget=IDENTITY_KEYS if plan.resume == "anyway" else ())],
            logger=loggers,
            enable_progress_bar=bars and "progress" in options.callbacks,
        )
    except MisconfigurationException as error:
        raise DistillError(
            f"trainer: {error}. Choose another one: trainer=auto uses the hardware of this machine"
        ) from error
    strategy = options.settings["strategy"]
    if trainer.world_size > 1 and isinstance(strategy, str) and (strategy == "auto" or strategy.startswith("ddp")):
        raise DistillError(
            f"trainer.strategy={strategy} with {trainer.world_size} processes: Lightning's own settings would copy "
            "rank 0's batch norm statistics to all before each step, and wait half an hour for an ended process. "
            f"Add trainer=ddp (trainer=ddp_cpu without GPUs), and trainer.devices={trainer.num_devices} where that is "
            "not all of them"
        )
    return trainer


def _build_parts(group: str, parts: Mapping[str, Callable[[], Any]], kind: type) -> list[Any]:
    built = []
    for name, build in parts.items():
        try:
            built.append(build())
        except MisconfigurationException as error:
            raise DistillError(f"{group}.{name}: {error}") from error
        if not isinstance(built[-1], kind):
            raise DistillError(
                f"{group}.{name}: expected a {kind.__name__} of Lightning's, got {type(built[-1]).__qualname__}"
            )
    return built


def shared_values(config: Mapping[str, Any], data: DetectionData) -> dict[str, str]:
    """Values that must be equal on all processes, by key: a configuration without paths, and the data."""
    return {name: str(value) for name, value in leaves({**config, "data seen": data.state_dict()})}


def silence_known_warnings() -> None:
    """Silence messages of Lightning that appear in every run and need no action."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    known = (
        "treespec, LeafSpec",
        "is not empty",
        "smaller than the logging interval",
        "have many workers",
        "broadcast_buffers. is deprecated",  # its successor does not exist in the oldest torch that we support
        "could not find the monitored key",  # schedule.steps may end inside an epoch, before the first evaluation
        "recommended to use .self.log",  # our metrics are equal on all ranks already
    )
    for words in known:
        warnings.filterwarnings("ignore", f".*{words}.*")
