"""Values that depend on the data: keys of ``data`` and ``schedule`` that are ``auto`` in the configuration.

They are resolved once, after the data is read and before the teacher is looked up. ``config.yaml`` and the checkpoints
of a run have the resolved values. A resume, an evaluation and a replay use these again, even if the data has grown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from distill.cli.config import compose, instantiate
from distill.cli.config.overrides import parse_overrides
from distill.data.auto_size import SizeChoice, choose_batch, choose_size, choose_square
from distill.data.datamodule import DetectionData
from distill.training.auto_schedule import choose_schedule
from distill.types import DistillError

AUTO = "auto"
AUTO_KEYS = (
    *("data.batch_size", "data.min_size", "data.max_size"),
    *("schedule.epochs", "schedule.evaluate_every", "schedule.optimizer.lr"),
)
"""Keys that may be ``auto``."""
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
COCO_CLASSES = tuple(
    name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if name not in ("__background__", "N/A")
)


FACT_KEYS = (
    *("source", "keep_empty", "use_difficult", "masks", "fraction", "limit", "on_error", "max_pixels"),
    *("val_fraction", "val_seed", "val_group_similar"),
)
"""Keys of ``data`` that decide which images and boxes a training sees."""


class PaperSettings(NamedTuple):
    """The papers' setting of a public data set, for detectors that see images of any ratio."""

    classes: Sequence[str]
    images: int
    """Minimum number of training images for these settings. Smaller subsets get the automatic choice."""
    schedule: str
    """Option of the group ``schedule``."""
    size: tuple[int, int]
    batch: int


PAPERS = {
    "COCO": PaperSettings(COCO_CLASSES, 50_000, "sgd_1x", (800, 1333), 2),
    "Pascal VOC": PaperSettings(VOC_CLASSES, 2_000, "voc", (600, 1000), 2),
}
PAPER_SQUARE = SizeChoice(640, 640, "as in the papers on RT-DETR and D-FINE")
"""Size for ``data.resize=square`` on the data sets of `PAPERS`, if no model has a size of its own."""


class DataFacts(NamedTuple):
    """What the choices depend on."""

    images: int
    classes: Sequence[str]
    size: SizeChoice
    square: SizeChoice
    """For ``data.resize=square``."""


UNREAD = DataFacts(
    1000, (), SizeChoice(800, 1333, "the data is not read"), SizeChoice(640, 640, "the data is not read")
)
"""Stands for the data while a configuration is checked before the data is read."""


def auto_keys(cfg: DictConfig) -> list[str]:
    """The keys of a composed configuration that the data decides."""
    return [key for key in AUTO_KEYS if OmegaConf.select(cfg, key) == AUTO]


def read_facts(data: DetectionData) -> DataFacts:
    """Read and check the training images.

    Raises:
        DistillError: the data fails a check.
    """
    records = data.training_records("train")
    return DataFacts(len(records), data.classes, choose_size(records), choose_square(records))


def resolve(cfg: DictConfig, facts: DataFacts, words: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Replace the values ``auto`` of a configuration.

    Args:
        cfg: the composed configuration.
        facts: of its training images.
        words: the overrides that composed `cfg`.

    Returns:
        A copy of the configuration without ``auto``, and lines that explain the choices.
    """
    cfg, keys = cfg.copy(), set(auto_keys(cfg))
    paper = next((name for name, known in PAPERS.items() if _is_complete(facts, known)), None)
    lines: list[str] = []
    is_square = cfg.data.resize == "square"
    size, batch = facts.size, None
    if is_square:
        size = _choose_square(cfg, PAPER_SQUARE if paper else facts.square)
    elif paper:
        size, batch = SizeChoice(*PAPERS[paper].size, f"as in papers on {paper}"), PAPERS[paper].batch
    if "data.min_size" in keys and "data.max_size" not in keys and size.min_size > cfg.data.max_size:
        size = SizeChoice(cfg.data.max_size, cfg.data.max_size, f"{size.reason}, within data.max_size")
    if "data.min_size" in keys:
        cfg.data.min_size = size.min_size
        lines.append(f"data.min_size={size.min_size}: {size.reason}")
    largest_min_size = cfg.data.min_size if isinstance(cfg.data.min_size, int) else max(cfg.data.min_size)
    if "data.max_size" in keys:
        cfg.data.max_size = max(round(largest_min_size * size.max_size / size.min_size), largest_min_size)
    if "data.batch_size" in keys:
        cfg.data.batch_size = batch or choose_batch(largest_min_size, cfg.data.max_size)
    if paper and "schedule.epochs" in keys:
        student = compose.target_class(OmegaConf.select(cfg, "model._target_"))
        own: str | None = getattr(student, "paper_schedule", None)
        option = own or PAPERS[paper].schedule
        cfg.schedule = _compose_schedule(option, paper, words)
        lines.append(f"schedule={option}: as in papers on {'RT-DETR and D-FINE' if own else paper}")
    elif any(key.startswith("schedule.") for key in keys):
        lines.append(_resolve_schedule(cfg, facts))
    return cfg, lines


def _choose_square(cfg: DictConfig, default: SizeChoice) -> SizeChoice:
    """Choose the side of squares: the student's own image size, or the teacher's if only it needs squares.

    The side is rounded up to a multiple of ``data.pad_to`` that all detectors which see padding as image can take.

    Args:
        cfg: the composed configuration.
        default: the choice if no detector has an image size of its own.
    """
    detectors, size = list(_square_detectors(cfg)), default
    for role, _, options in detectors[:1]:
        limits = [x for x in (options.get("min_size"), options.get("max_size")) if isinstance(x, int)]
        size = SizeChoice(min(limits), min(limits), f"the {role}'s own image size") if limits else default
    padding = [cfg.data.pad_to] if detectors else []
    multiple = math.lcm(*(kind.side_multiple(options) for _, kind, options in detectors), *padding)
    side = math.ceil(size.min_size / multiple) * multiple
    if side != size.min_size:
        size = SizeChoice(side, side, f"{size.reason}, rounded up to a multiple of {multiple} px")
    return size


def _square_detectors(cfg: DictConfig) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Role, class and options of each detector that sees padding as image, the student first."""
    teacher = OmegaConf.select(cfg, "teacher.model")
    weights = OmegaConf.select(cfg, "teacher.weights")
    nodes = {"student": cfg.model, "teacher": teacher}
    for role, node in nodes.items():
        found = compose.described_detector(weights) if role == "teacher" else None
        if found is None and OmegaConf.is_dict(node) and "_target_" in node:
            found = compose.target_class(node._target_), instantiate.to_containers(node)
        if found is not None and getattr(found[0], "needs_squares", False):
            yield role, *found


def _compose_schedule(option: str, paper: str, words: Sequence[str]) -> DictConfig:
    try:
        node: DictConfig = compose.compose_config([*words, f"schedule={option}", "hydra.run.dir=."]).schedule
    except HydraException as error:
        raise DistillError(
            f"the data was recognized as {paper}, so schedule={option} was chosen. It lacks a key that is given: "
            f"{str(error).splitlines()[0]} Choose a schedule that has the key, such as schedule=adamw"
        ) from error
    return node


def _is_complete(facts: DataFacts, known: PaperSettings) -> bool:
    return facts.images >= known.images and sorted(facts.classes) == sorted(known.classes)


def fill_schedule(node: DictConfig, images: int, batch: int, trained: bool) -> dict[str, float]:
    """Replace the values ``auto`` of a node ``schedule`` in place. Returns the chosen values by key.

    Args:
        node: the node; keys that are not ``auto`` stay.
        images: number of training images.
        batch: images per step of one process.
        trained: whether all layers of the student start from trained weights.
    """
    choice = choose_schedule(images, batch, trained, None if node.epochs == AUTO else node.epochs)
    values = {"epochs": choice.epochs, "evaluate_every": choice.evaluate_every, "optimizer.lr": choice.rate}
    chosen = {key: value for key, value in values.items() if OmegaConf.select(node, key) == AUTO}
    for key, value in chosen.items():
        OmegaConf.update(node, key, value)
    return chosen


def _resolve_schedule(cfg: DictConfig, facts: DataFacts) -> str:
    trained = bool(cfg.model.get("weights"))
    start = "trained weights" if trained else "random weights"
    if not trained and OmegaConf.select(cfg, "model.backbone.weights"):
        start = "a pretrained backbone"
    values = fill_schedule(cfg.schedule, facts.images, cfg.data.batch_size, trained)
    chosen = " ".join(f"schedule.{key}={value:g}" for key, value in values.items())
    return f"{chosen}: {facts.images} images in batches of {cfg.data.batch_size}, start from {start}"


def resolve_as_recorded(cfg: DictConfig, recorded: Mapping[str, Any], words: Sequence[str]) -> DictConfig:
    """Replace the values ``auto`` of a configuration by those of an earlier run with the same words.

    Args:
        cfg: the composed configuration.
        recorded: the configuration of the earlier run.
        words: the overrides that composed `cfg`. Overrides of schedule keys win over recorded values.
    """
    cfg, keys = cfg.copy(), auto_keys(cfg)
    for key in keys:
        if key.startswith("data."):
            OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.create(dict(recorded)), key))
    if any(key.startswith("schedule.") for key in keys):
        given = {
            override.key_or_group: override.value()
            for override in parse_overrides(words)
            if override.key_or_group.startswith("schedule.")
            and not override.is_delete()
            and override.key_or_group not in keys
        }
        cfg.schedule = recorded["schedule"]
        for key, value in given.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


_facts: dict[str, DataFacts] = {}


def facts_of(cfg: DictConfig, words: Sequence[str]) -> DataFacts:
    """Facts of the training images of a configuration. Read once per process for a data set."""
    key = _data_key(cfg)
    if key not in _facts:
        provisional, _ = resolve(cfg, UNREAD, words)
        _facts[key] = read_facts(instantiate.build_node(provisional.data))
    return _facts[key]


def remember_facts(cfg: DictConfig, facts: DataFacts) -> None:
    """Keep facts for `facts_of`: a teacher that learns from the same data needs them again."""
    _facts[_data_key(cfg)] = facts


def _data_key(cfg: DictConfig) -> str:
    return json.dumps({key: instantiate.to_containers(cfg.data[key]) for key in FACT_KEYS}, default=str)
