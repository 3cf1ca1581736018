"""The typed plan of a run, and everything that a run refuses before its first step.

`plan_run` needs the configuration alone; it reads the training images only for values that are ``auto``. `load_data`
and `check_metrics` need the data too, and run before a teacher is trained. `check_masks` and `check_squares` need the
detectors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from distill.cli.config import auto_values, instantiate, value_checks
from distill.cli.config.suggestions import nearest
from distill.cli.config.teacher_words import run_overrides
from distill.cli.runs import resume
from distill.cli.runs.teacher_cache import TeacherOptions
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.evaluate import MetricFactory
from distill.imaging.resizing import padded_size
from distill.losses.base import DistillLoss
from distill.precision import resolve_precision
from distill.run_folder import RunFolder
from distill.training.balance import GradientBalance
from distill.training.nonfinite import NonFiniteGuard
from distill.training.schedule import Schedule
from distill.types import DistillError

TRAIN = "train"
"""Value of ``baseline`` that trains the student alone, unless a finished run of it is found."""


class LossOptions(NamedTuple):
    """A distillation loss that is built once the student and the teacher are known."""

    kind: type[DistillLoss]
    build: Callable[..., DistillLoss]


@dataclass(frozen=True)
class TrainerOptions:
    """Options from which Lightning's trainer is built."""

    settings: Mapping[str, Any]
    """The node ``trainer``, with the precision resolved."""
    callbacks: Mapping[str, Callable[[], Any]]
    monitors: Mapping[str, Any]
    """Values that callbacks monitor, by the key that names the value."""
    loggers: Mapping[str, Callable[[], Any]]
    shared: Mapping[str, Any]
    """The configuration without paths, which must be equal on all processes."""


@dataclass(frozen=True)
class RunPlan:
    """Typed values of a run's configuration. Parts that depend on data or models are constructors with options."""

    config: Mapping[str, Any]
    """The resolved configuration in plain containers, for files and loggers."""
    overrides: Sequence[str]
    folder: RunFolder
    checkpoint: Path | None
    """The checkpoint that the run resumes from."""
    resume: str
    seed: int
    metric: str
    """Name of the result that a sweep compares."""
    test: bool
    pictures: int
    device: torch.device
    data: DetectionData
    student: Callable[..., Detector]
    channels_last: bool
    inherit: bool
    """Whether the student starts from the teacher's neck and heads."""
    teacher: TeacherOptions | None
    losses: Mapping[str, LossOptions]
    supervised: Mapping[str, float]
    metrics: Sequence[MetricFactory]
    schedule: Schedule
    guard: NonFiniteGuard
    balance: GradientBalance | None
    warns_of_places: bool
    """Whether two losses that compare the same place cause a warning."""
    trainer: TrainerOptions
    baseline: str | None
    """``train``, or a finished run of the student alone."""
    baseline_epochs: float
    """Epochs of a baseline that is trained, relative to those of this run."""
    choices: Sequence[str] = ()
    """Lines that explain the values that were ``auto``."""

    @property
    def size_is_chosen(self) -> bool:
        """Whether the size of the resized images was chosen, from the data or by a model's own size."""
        return any(line.startswith("data.min_size=") for line in self.choices)

    @property
    def names_baseline(self) -> bool:
        """Whether the student is compared with a finished run that ``baseline`` names."""
        return self.baseline not in (None, TRAIN) and bool(self.losses or self.inherit)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss, or the initialization of the student, reads a teacher."""
        return self.inherit or any(loss.kind.needs_teacher for loss in self.losses.values())


def plan_run(cfg: DictConfig, run: Path | None = None) -> RunPlan:
    """Check a configuration and turn it into typed values. Seeds the global random generators.

    Values that are ``auto`` are resolved. For this, the training images are read, unless the run is resumed.

    Args:
        cfg: the composed configuration.
        run: folder of the run, for the command ``train``: its checkpoints are searched for ``ckpt_path=last``.

    Raises:
        DistillError: an invalid value, an unknown class, a missing teacher, a checkpoint of another run, or training
            images that fail a check.
    """
    checkpoint = None if run is None else resume.find_checkpoint(cfg, run)
    if not auto_values.auto_keys(cfg):
        return _plan(cfg, run, checkpoint)
    words = list(HydraConfig.get().overrides.task)
    if checkpoint is not None and (recorded := resume.recorded_config(checkpoint)):
        return _plan(auto_values.resolve_as_recorded(cfg, recorded, words), run, checkpoint)
    provisional, _ = auto_values.resolve(cfg, auto_values.UNREAD, words)
    read = _plan(provisional, run, checkpoint).data  # refuses what it can before the data is read
    facts = auto_values.read_facts(read)
    auto_values.remember_facts(cfg, facts)
    resolved, choices = auto_values.resolve(cfg, facts, words)
    plan = _plan(resolved, run, checkpoint)
    plan.data.adopt_records(read)
    return replace(plan, choices=choices)


def _plan(cfg: DictConfig, run: Path | None, checkpoint: Path | None) -> RunPlan:
    """Check a configuration without ``auto`` values and turn it into typed values."""
    value_checks.validate_values(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    resume.validate_config(cfg, checkpoint)
    plan = RunPlan(
        config=instantiate.to_containers(cfg),
        overrides=list(HydraConfig.get().overrides.task),
        folder=RunFolder(run or cfg.paths.run),
        checkpoint=checkpoint,
        resume=cfg.resume,
        seed=cfg.seed,
        metric=cfg.metric,
        test=cfg.test,
        pictures=cfg.pictures,
        device=instantiate.trainer_device(cfg),
        data=instantiate.build_node(cfg.data),
        student=instantiate.prepare_node(cfg.model),
        channels_last=cfg.channels_last,
        inherit=cfg.init == "inherit",
        teacher=plan_teacher(cfg),
        losses=plan_losses(cfg),
        supervised=instantiate.to_containers(cfg.supervised),
        metrics=[instantiate.build_node(node) for node in instantiate.named_nodes(cfg.metrics).values()],
        schedule=instantiate.build_node(cfg.schedule),
        guard=instantiate.build_node(cfg.guard),
        balance=plan_balance(cfg),
        warns_of_places=cfg.distill.same_place == "warn",
        trainer=_plan_trainer(cfg),
        baseline=cfg.baseline,
        baseline_epochs=cfg.baseline_epochs,
    )
    if not plan.losses and plan.data.has_unlabeled:
        plan.data.leave_out_unlabeled()
    if plan.needs_teacher and plan.teacher is None:
        user = f"distillation losses {list(plan.losses)}" if plan.losses else "init=inherit"
        raise DistillError(
            f"{user} cannot do without a teacher, and conf/teachers.yaml "
            "has no default teacher for this student: choose teacher=MODEL"
        )
    if run is not None and plan.names_baseline:
        named_baseline(plan)
    return plan


def named_baseline(plan: RunPlan) -> RunFolder:
    """The finished run that ``baseline`` names.

    Raises:
        DistillError: the run does not exist, or is not finished.
    """
    run = RunFolder(Path(str(plan.baseline)).expanduser().absolute())
    if not run.finished:
        raise DistillError(
            f"baseline={plan.baseline}: expected train, or the folder of a finished run with distill=none; "
            + (f"the run in {run.path} is not finished" if run.path.exists() else f"{run.path} does not exist")
        )
    return run


def plan_teacher(cfg: DictConfig) -> TeacherOptions | None:
    """Options of the teacher. None without a teacher, or with only the keys that an experiment sets for a teacher."""
    options = cfg.teacher
    model = options.get("model") if isinstance(options, DictConfig) else None
    if not (isinstance(model, DictConfig) and "_target_" in model):
        return None
    # With weights, the model's options may come from the weights' own description, so wrong ones are not refused yet.
    build = partial(instantiate.build_node, model) if options.weights else instantiate.prepare_node(model)
    return TeacherOptions(
        build=build,
        model=instantiate.to_containers(model),
        option=str(HydraConfig.get().runtime.choices["model@teacher.model"]),
        weights=options.weights,
        train=options.train,
        seed=options.seed,
        own=run_overrides(instantiate.to_containers(options), list(HydraConfig.get().overrides.task)),
        run=instantiate.to_containers(options.run),
        min_ap=options.min_ap,
        class_map=instantiate.to_containers(cfg.classes).get("map"),
        optimization={name: options[name] for name in ("fold", "channels_last", "dtype")},
        cache=Path(cfg.paths.teachers).absolute(),
        student_overrides=list(HydraConfig.get().overrides.task),
        student_backbone=OmegaConf.select(cfg, "model.backbone.weights"),
        metrics=instantiate.to_containers(cfg.metrics),
        resize=cfg.data.resize,
        side=cfg.data.min_size,
    )


def plan_losses(cfg: DictConfig) -> dict[str, LossOptions]:
    """Class and constructor of each distillation loss by name.

    Raises:
        DistillError: a class is not a `DistillLoss`.
    """
    losses = {}
    for name, node in instantiate.named_nodes(cfg.distill.losses).items():
        kind = instantiate.load_target(node)
        if not (isinstance(kind, type) and issubclass(kind, DistillLoss)):
            raise DistillError(f"distill.losses.{name}: expected a DistillLoss, got {node.get('_target_')}")
        losses[name] = LossOptions(kind, instantiate.prepare_node(node))
    return losses


def plan_balance(cfg: DictConfig) -> GradientBalance | None:
    """The measured weights of the distillation losses; None with ``distill.balance=none``, or without losses.

    Raises:
        DistillError: invalid shares or steps, or shares of other losses.
    """
    options, losses = instantiate.to_containers(cfg.distill), list(instantiate.named_nodes(cfg.distill.losses))
    if options["balance"] == "none" or not losses:
        return None
    balance = GradientBalance(options["balance_share"], options["balance_steps"])
    balance.require_methods(losses)
    return balance


def _plan_trainer(cfg: DictConfig) -> TrainerOptions:
    precision = resolve_precision(cfg.trainer.precision, instantiate.trainer_device(cfg).type == "cuda")
    settings = {name: value for name, value in instantiate.to_containers(cfg.trainer).items() if name != "save_every"}
    callbacks = instantiate.named_nodes(cfg.callbacks)
    return TrainerOptions(
        settings=settings | {"precision": precision},
        callbacks={name: instantiate.prepare_node(node) for name, node in callbacks.items()},
        monitors={f"callbacks.{name}.monitor": node.get("monitor") for name, node in callbacks.items()},
        loggers={name: instantiate.prepare_node(node) for name, node in instantiate.named_nodes(cfg.logger).items()},
        shared=shared_config(cfg),
    )


def shared_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration without paths, which hold times. It must be equal on all processes."""
    shared = cfg.copy()
    for name in shared.paths:
        shared.paths[name] = str(name)
    resolved: dict[str, Any] = instantiate.to_containers(shared)
    return resolved


def load_data(plan: RunPlan) -> tuple[DetectionData, list[str]]:
    """Read and check the data. Returns the data and the splits on which the final student is evaluated.

    A test split that cannot be read causes a warning, and does not stop the run.

    Raises:
        DistillError: the data fail a check, or the checkpoint was made with other data.
    """
    data, splits = plan.data, ["val"]
    data.setup("fit")
    resume.validate_data(plan.resume, plan.checkpoint, data)
    if plan.test and data.has_split("test"):
        try:
            data.setup("test")
            splits.append("test")
        except DistillError as error:
            warnings.warn(f"the test split is left out: {error}", stacklevel=2)
    return data, splits


def check_metrics(plan: RunPlan, data: DetectionData) -> None:
    """Refuse two metrics that give the same name, and a name for a sweep or callback that no metric gives.

    The known names are those of an evaluation without detections.
    """
    known: list[str] = []
    for make in plan.metrics:
        metric = make(data.ground_truth("val"), data.classes)
        metric.update((), ())
        names = [f"val/{name}" for name in metric.compute()]
        duplicates = [name for name in names if name in known]
        if duplicates:
            raise DistillError(
                f"metrics: {list(plan.config['metrics'])} give {duplicates[0]} twice: set one of them to null"
            )
        known += names
    for key, name in {"metric": plan.metric, **plan.trainer.monitors}.items():
        measured = key == "metric" or str(name).startswith("val/")  # a callback may monitor a loss term
        if measured and plan.trainer.settings["limit_val_batches"] == 0 and "early_stop" in key:
            raise DistillError(
                f"{key}={name} with trainer.limit_val_batches=0, which leaves out all evaluations: set "
                "callbacks=default, or remove the limit"
            )
        if measured and name not in known:
            raise DistillError(f"{key}={name} is not among the measured values{nearest(str(name), known)}")


def check_masks(plan: RunPlan, student: Detector, data: DetectionData) -> None:
    """Refuse a student with a mask head on data without masks, and a mask metric of a student without a mask head."""
    if "mask_logits" in student.spec.outputs and not data.masks:
        raise DistillError(
            f"the student is a {student.spec.family}, which learns from instance masks, but data.masks=false: add "
            "data.masks=true (data=coco and data=shapes have masks), or choose a model without masks"
        )
    if "/mask_" in plan.metric and "mask_logits" not in student.spec.outputs:
        raise DistillError(
            f"metric={plan.metric} measures masks, but the student, a {student.spec.family}, finds none: set "
            "metric=val/AP, or choose a model with masks (model=mask_rcnn_r50)"
        )


def check_squares(
    data: DetectionData, kind: type[Detector], options: Mapping[str, Any], role: str, training: bool = True
) -> None:
    """Refuse squares that are padded, or have a side that the detector cannot take, if it sees padding as image.

    Args:
        data: the data.
        kind: class of the detector.
        options: arguments of its constructor.
        role: ``student`` or ``teacher``, for messages.
        training: whether the detector sees training images too.

    Raises:
        DistillError: names the key of the data.
    """
    if not kind.needs_squares or data.eval_transform.shape != "square":
        return
    multiple = kind.side_multiple(options)
    transforms = ({"min_size": data.train_transform} if training else {}) | {"eval_min_size": data.eval_transform}
    for key, transform in transforms.items():
        side, _ = square = transform.fit((1, 1))
        if side % multiple:
            below = side // multiple * multiple
            sides = f"{below} or {below + multiple}" if below else str(multiple)
            raise DistillError(
                f"data.{key}: the {role} is a {kind.family}, which takes squares whose side is a multiple of "
                f"{multiple} pixels, got squares of {side}. Set data.min_size and, if given, data.eval_min_size "
                f"to {sides}"
            )
        if side % data.pad_to:
            padded, _ = padded_size([square], data.pad_to)
            raise DistillError(
                f"data.pad_to={data.pad_to}: squares of {side} pixels would be padded to {padded}, and the {role}, a "
                f"{kind.family}, sees padding as image. Set data.pad_to={multiple}, or data.min_size to a multiple of "
                f"{math.lcm(multiple, data.pad_to)}"
            )
