"""The teacher of a run: the source of its weights, and the run that trains a teacher that is not cached.

A cached teacher is a finished run of ``distill=none``.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from distill.cli.config import compose
from distill.cli.config.auto_values import AUTO, auto_keys, facts_of, resolve
from distill.cli.config.instantiate import to_containers, without_weights
from distill.cli.config.overrides import TRAINER_KEYS, node_overrides, parse_overrides
from distill.cli.config.target_policy import COMMAND_LINE_KEYS
from distill.cli.runs.results import fingerprints, is_measured_on, read_summary
from distill.cli.runs.resume import LOADING_KEYS
from distill.cli.runs.shared_run import SharedRun, compose_run, digest
from distill.cli.tables import print_line
from distill.labels import bridge_classes, describe_bridge
from distill.quoting import quote_value
from distill.run_folder import STUDENT
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector
    from distill.teacher import Teacher

# Groups and keys that a teacher's run takes over from the student's run: the data, the machine and the recipe.
KEPT_GROUPS = ("data", "schedule", "trainer", "experiment", "paths", "trust", "config_dirs")
KEPT_TRAINER = ("accelerator", "devices", "strategy", "precision", "save_every")  # no num_nodes: one machine trains it
# Keys that do not change the teacher's weights. Runs that differ in these keys only share one teacher.
IGNORED_DATA = (*LOADING_KEYS, "on_overlap", "unlabeled")
IGNORED_MODEL = ("box_roi_align", "min_size", "max_size")  # the order of additions; sizes come from `data`
# These check, log and print only.
IGNORED_CALLBACKS = ("teacher", "schedule", "terms", "gradients", "rate", "panels", "history", "lines", "progress")
NEWER_KEYS = (
    ("data", "resize", "ratio"),
    ("schedule", "flat", 0.5),
    ("schedule", "backbone_rate", 1.0),
    ("model", "input_stride", 1),
)
"""Group, key and value as in older versions, which did not have the key. Their cached teachers stay valid."""
UNTRAINED = "untrained"
"""Source of a teacher that has random weights."""


@dataclass(frozen=True)
class TeacherOptions:
    """The values below ``teacher``, and the settings that the teacher's run takes over from the student's run."""

    build: Callable[..., Detector]
    """The constructor of ``teacher.model``, with its options."""
    model: Mapping[str, Any]
    """The same options in plain containers."""
    option: str
    """Name of the model option, such as ``frcnn_r50``."""
    weights: str | None
    train: str
    seed: int
    own: Mapping[str, Sequence[str]]
    """Overrides of the teacher's run from ``teacher.schedule`` and ``teacher.data``, by group."""
    run: Sequence[str]
    """More overrides of the teacher's run."""
    min_ap: float | None
    class_map: Mapping[str, str | None] | str | None
    """``classes.map``: mapping from the teacher's classes to the data's classes; None: by exact name."""
    optimization: Mapping[str, Any]
    """``fold``, ``channels_last`` and ``dtype`` of `Teacher`."""
    cache: Path
    """Folder of all cached teachers."""
    student_overrides: Sequence[str]
    student_backbone: str | None
    """Start weights of the student's backbone."""
    metrics: Mapping[str, Any]
    """Metrics of this run. The results of another run are reused only if its metrics are equal."""
    resize: str
    """``data.resize`` of this run: the teacher sees its images."""
    side: Any
    """``data.min_size`` of this run: the side of squares."""

    @property
    def image_size(self) -> dict[str, int]:
        """Size of the images for the teacher's constructor, if they are squares; otherwise the constructor's own."""
        return {"min_size": self.side, "max_size": self.side} if self.resize == "square" else {}

    def __post_init__(self) -> None:
        """Refuse a head that does not come from the weights.

        Raises:
            DistillError: ``teacher.model.head=new`` together with ``teacher.weights``.
        """
        if self.weights is not None and self.model.get("head") == "new":
            raise DistillError(
                "teacher.model.head=new: a teacher whose head has random weights cannot teach. Remove "
                "teacher.model.head: the classes are matched by name. If the weights lack classes of the data, train "
                f"a teacher from them: teacher.weights=null teacher.model.weights={quote_value(self.weights)} "
                "teacher.model.head=match"
            )


def planned_teacher(options: TeacherOptions, classes: Sequence[str]) -> Detector:
    """The teacher that ``teacher.model`` describes, before it is trained. Allocates no memory for weights.

    Raises:
        DistillError: the options do not fit together.
    """
    import torch

    with torch.device("meta"):
        return untrained(options, classes)


def untrained(options: TeacherOptions, classes: Sequence[str]) -> Detector:
    """The detector that ``teacher.model`` describes, with random weights.

    Raises:
        DistillError: the options do not fit together, or not to the size of the images.
    """
    try:
        return options.build(classes=list(classes), **without_weights(options.model), **options.image_size)
    except DistillError as error:
        raise DistillError(f"teacher.model: {error}") from error


def find_teacher(options: TeacherOptions, data: DetectionData) -> Teacher:
    """The teacher that ``teacher.weights`` names, or the cached teacher, which is trained first if it does not exist.

    Args:
        options: teacher options of the run.
        data: provides the classes for a plain weights file, which lists none. The fingerprints of the data decide
            whether the results that a run measured for its student are valid here.

    Raises:
        DistillError: no teacher is cached and ``teacher.train=never``, or the weights do not fit.
    """
    from distill.detectors.registry import load_detector

    if options.weights is None:
        if options.student_backbone and not options.model.get("backbone", {}).get("weights"):
            warnings.warn(
                f"the student's backbone starts from {options.student_backbone}, its teacher's from random weights: "
                "set teacher.model.backbone.weights too, or start=imagenet for both",
                stacklevel=2,
            )
        run = teacher_run(options)
        if options.train == "never" and not run.finished:
            raise DistillError(
                f"there is no trained teacher at {run.folder} (a finished run with its {STUDENT}) and "
                "teacher.train=never. Name one with teacher.weights=…, or make it with:\n  " + shlex.join(run.command)
            )
        run.train()
        source = str(run.folder)
        detector = load_detector(source)
    else:
        source = options.weights
        if Path(source).expanduser().exists():
            source = str(
                Path(source).expanduser().absolute()
            )  # recorded, and read later from other working directories
        detector = load_teacher(options, source, data.classes)
    for line in bridge_teacher(options, detector, data.classes):
        print_line("classes.map", line)
    return as_teacher(options, detector, source, _known_values(source, options.metrics, data))


def bridge_teacher(options: TeacherOptions | None, detector: Detector, classes: Sequence[str]) -> list[str]:
    """Map a teacher's classes to the classes of the data by ``classes.map``. Without this option, nothing changes.

    Returns:
        Lines that say what teaches each class of the data.

    Raises:
        DistillError: the map has an unknown name, or leads to no class of the data.
    """
    if options is None or options.class_map is None:
        return []
    bridge = bridge_classes(detector.spec.classes, classes, options.class_map)
    detector.spec = replace(detector.spec, bridge=bridge)
    return describe_bridge(bridge, classes)


def as_teacher(
    options: TeacherOptions, detector: Detector, source: str, values: Mapping[str, float] | None = None
) -> Teacher:
    """Make a detector this run's teacher, optimized by ``teacher.fold``, ``channels_last`` and ``dtype``."""
    from distill.teacher import Teacher

    return Teacher(detector, source, values, **options.optimization)


def load_teacher(options: TeacherOptions | None, source: str, classes: Sequence[str]) -> Detector:
    """Load a detector from a run folder, a checkpoint, an exported student, a file of weights, or torchvision.

    Run folders, exported students and checkpoints of runs describe their model. From other weights, the detector gets
    the rows of `classes`.

    Raises:
        DistillError: the weights do not describe their model, and the configuration has no teacher that does; or the
            weights lack a class.
    """
    from distill.detectors.registry import restore_detector
    from distill.detectors.student_files import read_detector
    from distill.detectors.transformers_weights import is_published

    path = Path(source).expanduser()
    if path.exists() and not is_published(source):
        source = str(path)
        model, state = read_detector(path)
        if model is not None:
            return restore_detector(model, state, source)
    if options is None:
        raise DistillError(f"{source} does not describe its model: choose its teacher=…, not none")
    backbone = dict(options.model.get("backbone", {}))
    kind = compose.target_class(options.model.get("_target_"))
    if not hasattr(kind, "has_batch_norms") or kind.has_batch_norms(backbone):
        backbone["norm"] = "frozen"  # computes as in evaluation mode
    names = list(classes) if options.class_map is None else None  # a map needs all classes of the weights
    return options.build(classes=names, weights=source, backbone=backbone, head="keep", **options.image_size)


def teacher_run(options: TeacherOptions) -> SharedRun:
    """The run in which this teacher is cached, or will be."""
    overrides = teacher_overrides(options)
    return SharedRun("teacher", options.cache / f"{options.option}-{_cache_key(overrides)}", overrides)


def teacher_overrides(options: TeacherOptions) -> list[str]:
    """Overrides of the run that trains this teacher: the student's, without those that concern the student alone.

    The teacher learns from images of the shape that it will see, ``data.resize`` of the student's run, and from squares
    of the same side. Keys of ``teacher.schedule``, ``teacher.data`` and ``teacher.run`` follow, in this order, and win.
    """
    kept: list[str] = []
    replaced = {group for group, words in options.own.items() if words and words[0].startswith(f"{group}=")}
    for override in parse_overrides(options.student_overrides):
        key, line = override.key_or_group, str(override.input_line)
        group, _, rest = key.partition(".")
        if (
            group in KEPT_GROUPS
            and group not in replaced
            and (group != "trainer" or not rest or rest.split(".")[0] in KEPT_TRAINER)
        ):
            kept.append(line)
    for override in parse_overrides(options.run):  # may come from a shared file, and become a command line
        if override.is_hydra_override() or override.key_or_group in COMMAND_LINE_KEYS:
            raise DistillError(f"teacher.run: '{override.input_line}' may not be said here; remove it")
    lines = [
        *(*kept, f"model={options.option}", "distill=none", "teacher=none"),
        *("trainer.num_nodes=1", f"seed={options.seed}"),
    ]
    if compose_run(lines, "teacher").init != "scratch":  # an experiment says so
        lines.append("init=scratch")
    own = [word for words in options.own.values() for word in words]
    composed = compose_run([*lines, *own], "teacher")
    # Its own detector alone would decide: a CNN that teaches an RT-DETR would learn from images of any ratio, and an
    # RF-DETR Large that teaches a Nano from larger squares.
    if composed.data.resize != options.resize:
        lines.append(f"data.resize={options.resize}")
        composed = compose_run([*lines, *own], "teacher")
    if composed.data.resize == "square" and composed.data.min_size == AUTO:
        largest = composed.data.max_size
        lines.append(f"data.min_size={min(options.side, options.side if largest == AUTO else largest)}")
    return [*lines, *own, *node_overrides("model", options.model, composed), *options.run]


def run_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration of the teacher's run. Values that are ``auto`` are resolved, for which its data is read."""
    config = compose_run(overrides, "teacher")
    return resolve(config, facts_of(config, overrides), overrides)[0] if auto_keys(config) else config


def _cache_key(overrides: Sequence[str]) -> str:
    config = run_config(overrides)
    data = {name: value for name, value in to_containers(config.data).items() if name not in IGNORED_DATA}
    model = {name: value for name, value in to_containers(config.model).items() if name not in IGNORED_MODEL}
    content = {"data": data, "model": model, "schedule": to_containers(config.schedule), "seed": config.seed}
    for group, key, value in NEWER_KEYS:
        if content[group].get(key) == value:
            del content[group][key]
    content |= {"supervised": to_containers(config.supervised), "init": config.init}
    # Not resolved: the paths of callbacks are below each run's own folder.
    callbacks: Any = OmegaConf.to_container(config.callbacks)
    content["callbacks"] = {name: node for name, node in callbacks.items() if name not in IGNORED_CALLBACKS}
    content["trainer"] = {name: config.trainer.get(name) for name in TRAINER_KEYS}
    return digest(content)[:10]


def _known_values(source: str, metrics: Mapping[str, Any], data: DetectionData) -> dict[str, float]:
    """Results that a finished run measured for its student on the same images with the same metrics."""
    summary = read_summary(source)
    same = [split for split in fingerprints(summary) if is_measured_on(summary, metrics, data, split)]
    return {name: value for name, value in summary.get("student", {}).items() if name.split("/")[0] in same}
