"""Options of the configuration as objects, for Python: `distill.model("frcnn_r50", …)`, `distill.schedule("sgd")`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from distill.cli.config import compose, instantiate
from distill.cli.config.auto_values import AUTO, fill_schedule
from distill.cli.config.suggestions import nearest
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.training.schedule import Schedule
from distill.type_checks import leaves
from distill.types import DistillError


def model(name: str, classes: Sequence[str], **options: Any) -> Detector:
    """Build the detector of an option of the group ``model``.

    Args:
        name: name of the option, such as ``frcnn_r50``; see ``conf/model``.
        classes: class names in label order, such as `DetectionData.classes`.
        options: arguments of the detector's constructor that replace those of the option. A mapping, such as
            ``backbone={"width": 0.5}``, replaces single entries.

    Raises:
        DistillError: there is no such option, or the detector refuses its arguments.

    Example:
        `distill.model("frcnn_r10_mini", data.classes, min_size=128, max_size=128)`
    """
    sizes = {key: options.pop(key) for key in ("min_size", "max_size") if key in options}
    detector: Detector = instantiate.build_node(_node("model", name, options), classes=list(classes), **sizes)
    return detector


def schedule(name: str, data: DetectionData | None = None, trained: bool = False, **options: Any) -> Schedule:
    """Build the schedule of an option of the group ``schedule``.

    Args:
        name: name of the option, such as ``sgd_1x``; see ``conf/schedule``.
        data: the data; only ``auto`` needs it, and reads the training images.
        trained: whether all layers of the student start from trained weights; only ``auto`` reads it.
        options: arguments of `Schedule` that replace those of the option.

    Raises:
        DistillError: there is no such option, `auto` is called without data, or an argument is out of range.

    Example:
        `distill.schedule("auto", data)`
    """
    node = _node("schedule", name, options)
    if any(value == AUTO for _, value in leaves(instantiate.to_containers(node))):
        if data is None:
            raise DistillError(f"schedule {name}: needs the data: distill.schedule('{name}', data)")
        fill_schedule(node, len(data.training_records("train")), data.batch_size, trained)
    built: Schedule = instantiate.build_node(node)
    return built


def _node(group: str, name: str, options: dict[str, Any]) -> DictConfig:
    known = compose.config_groups()[group]
    if name not in known or name == "base":
        raise DistillError(f"distill.{group}: there is no option '{name}'{nearest(name, known)}")
    node: DictConfig = compose.compose_config([f"{group}={name}", "hydra.run.dir=."])[group]
    with open_dict(node):
        merged = OmegaConf.merge(node, options)
    assert isinstance(merged, DictConfig)
    return merged
