"""The detector in another project's file, and functions that both formats share: renaming, shapes, rows, checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.types import DistillError

State = Mapping[str, Tensor]

NEVER = -100.0
"""Bias of the class logit that torchvision's dense heads have for label 0: its probability is 0, in training too."""

ALL = 1_000_000
"""A number of detections that no image reaches: no limit."""

BLOCKS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
"""(Whether blocks are bottlenecks, blocks per stage) -> depth of a ResNet."""


@dataclass
class ForeignDetector:
    """The detector in a file of another project, with distill's options and torchvision's tensor names."""

    project: str
    """Name of the project, for messages."""
    family: str
    """Name of the family, see `DetectorSpec.family`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Dotted path of a constructor's option -> value. Missing options have their default values."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """torchvision's state dict."""
    unused: list[str] = field(default_factory=list)
    """Names of tensors in the file that the detector does not need."""
    facts: dict[str, str] = field(default_factory=dict)
    """Dotted path of an option -> where its value comes from."""
    warnings: list[str] = field(default_factory=list)
    """One sentence for each assumption that the file does not confirm."""
    resize: dict[str, Any] = field(default_factory=dict)
    """Options of the resize, see `imaging.resizing.ResizeOptions`."""
    means: dict[str, list[float]] = field(default_factory=dict)
    """Option of delta weights -> means of the deltas, in units of the layer's outputs. Only where they are not 0."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Name of a tensor in the file -> its name in `state`."""

    def set(self, source: str, **options: Any) -> None:
        """Set options and record their origin. A double underscore in a name stands for a dot."""
        for name, value in options.items():
            path = name.replace("__", ".")
            self.options[path] = value
            self.facts[path] = source

    def assume(self, sentence: str, **options: Any) -> None:
        """Set options that the file does not contain, and add a warning."""
        self.set("assumed", **options)
        self.warnings.append(sentence)

    @property
    def description(self) -> dict[str, Any]:
        """The detector as `Detector.describe` returns it. Options at their default are left out."""
        model: dict[str, Any] = {"family": self.family}
        for path, value in self.options.items():
            *parents, leaf = path.split(".")
            node = model
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return model


def unsupported(where: str, part: str, found: str) -> DistillError:
    """The error for a detector that distill's families cannot express."""
    return DistillError(
        f"{where}: {part}: {found}. distill's detectors cannot express this part; choose weights of a Faster R-CNN, "
        "Mask R-CNN, RetinaNet or FCOS with a ResNet or ResNeXt and a plain FPN"
    )


@contextmanager
def reading_configuration(where: str) -> Iterator[None]:
    """Raise an error that names the file if a value of its configuration has an unexpected type.

    Raises:
        DistillError: instead of the TypeError or other error that such a value causes.
    """
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DistillError(
            f"{where}: its configuration has a value that cannot be read ({error}); give the configuration of the "
            "training with distill import --config"
        ) from error


def check_parts(names: Iterable[str], parts: Sequence[tuple[str, str]], where: str) -> None:
    """Refuse a file with a part that no family has.

    Args:
        names: of the tensors.
        parts: pairs of a regular expression for names, and the part that such names belong to.
        where: the file, for the message.

    Raises:
        DistillError: names the part, and the first tensor of it.
    """
    names = list(names)
    for pattern, part in parts:
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise unsupported(where, part, found)


def rename(state: State, table: Sequence[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Rename tensors by a table.

    Args:
        state: the tensors.
        table: pairs of a name in the file and a name here. ``{i}`` stands for a number, on the right also with a
            calculation: ``{i-1}``, ``{i*3}``, ``{i*3+1}``, ``{i/2}``. A last ``*`` stands for the rest of the name. The
            first line that fits counts.

    Returns:
        Name in the file -> name here, and the names that fit no line.
    """
    lines = [(re.compile(_pattern(left)), right) for left, right in table]
    renamed, unused = {}, []
    for name in state:
        for pattern, right in lines:
            if match := pattern.fullmatch(name):
                renamed[name] = _fill(right, match.groupdict())
                break
        else:
            unused.append(name)
    return renamed, unused


def _pattern(left: str) -> str:
    escaped = re.escape(left).replace(r"\*", r"(?P<rest>\w+)")
    return re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", escaped)


def _fill(right: str, found: Mapping[str, str]) -> str:
    def number(match: re.Match[str]) -> str:
        value = int(found[match[1]])
        for sign, digits in re.findall(r"([-+*/])(\d+)", match[2]):
            operand = int(digits)
            value = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[sign]
        return str(value)

    return re.sub(r"\{(\w)([-+*/\d]*)\}", number, right).replace("*", found.get("rest", ""))


def body_shape(state: State, blocks: Callable[[int], str], where: str) -> dict[str, Any]:
    """Read depth, groups and group width of a ResNet from its tensors, by torchvision's names below ``backbone.body``.

    Args:
        state: torchvision's state dict.
        blocks: number of a stage (1 to 4) -> the prefix of its blocks.
        where: the file, for messages.

    Raises:
        DistillError: the network is not a ResNet or ResNeXt of a known depth.
    """
    counts = []
    for stage in range(1, 5):
        prefix = blocks(stage)
        numbers = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
        counts.append(len({number for number in numbers if number.isdigit()}))
    bottleneck = f"{blocks(1)}0.conv3.weight" in state
    depth = BLOCKS.get((bottleneck, tuple(counts)))
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise unsupported(where, "backbone", f"stages of {counts} {kind} blocks")
    grouped, first = state.get(f"{blocks(1)}0.conv2.weight"), state.get(f"{blocks(1)}0.conv1.weight")
    if not bottleneck or grouped is None or first is None or grouped.dim() != 4:
        return {"depth": depth}
    groups = grouped.shape[0] // grouped.shape[1]
    width = first.shape[0] // groups
    return {"depth": depth} if (groups, width) == (1, 64) else {"depth": depth, "groups": groups, "group_width": width}


def background_first(rows: Tensor) -> Tensor:
    """Move the last row, the background, to the front."""
    return torch.cat([rows[-1:], rows[:-1]])


def background_added(rows: Tensor, per_class: int, classes: int) -> Tensor:
    """Add rows of zeros for the background in front. Rows that all classes share are repeated for each class."""
    if len(rows) == per_class and classes > 1:
        rows = rows.repeat(classes, *(1 for _ in rows.shape[1:]))
    return torch.cat([torch.zeros_like(rows[:per_class]), rows])


def first_label_added(rows: Tensor, anchors: int, value: float = 0.0) -> Tensor:
    """Add a row for label 0 in front of the K rows of each anchor: (A*K, ...) -> (A*(K+1), ...)."""
    split = rows.reshape(anchors, -1, *rows.shape[1:])
    return torch.cat([torch.full_like(split[:, :1], value), split], dim=1).flatten(0, 1)


def convert_rows(state: dict[str, Tensor], classes: int, anchors: int, where: str) -> None:
    """Bring the rows that belong to classes into torchvision's order, in place: background first, label 0 first.

    Args:
        state: torchvision's names, with the rows of the other project: background last, or no background.
        classes: number of classes, without background.
        anchors: anchors per cell of a dense head.
        where: the file, for the message.

    Raises:
        DistillError: a tensor has rows for another number of classes.
    """
    for kind, value in (("weight", 0.0), ("bias", NEVER)):
        for name, change in (
            (f"roi_heads.box_predictor.cls_score.{kind}", background_first),
            (f"roi_heads.box_predictor.bbox_pred.{kind}", lambda rows: background_added(rows, 4, classes)),
            (f"roi_heads.mask_predictor.mask_fcn_logits.{kind}", lambda rows: background_added(rows, 1, classes)),
            (
                f"head.classification_head.cls_logits.{kind}",
                lambda rows, value=value: first_label_added(rows, anchors, value),
            ),
        ):
            if name not in state:
                continue
            try:
                state[name] = change(state[name])
            except (RuntimeError, TypeError) as error:
                raise unsupported(where, "layer", f"{name} of shape {tuple(state[name].shape)}") from error


def class_names(names: Any, count: int, found: ForeignDetector, where: str) -> None:
    """Set the option `classes`: the given names, COCO's for 80 classes, or numbers.

    Raises:
        DistillError: there are more or fewer names than classes.
    """
    if isinstance(names, str):  # old files of one class
        names = [names]
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        if len(names) != count:
            raise DistillError(
                f"{where}: the weights are for {count} classes, but {len(names)} names were given: "
                f"{list(names)[:8]}; give one name for each class, in label order, with distill import --classes"
            )
        found.set("names in the file or the command", classes=list(names))
    elif count == len(coco_names()):
        found.assume("The file names no classes. 80 classes are taken to be COCO's.", classes=list(coco_names()))
    else:
        found.assume(
            f"The file names no classes. Its {count} classes are called class_1 to class_{count}; give the names with "
            "--classes",
            classes=[f"class_{number + 1}" for number in range(count)],
        )


def coco_names() -> tuple[str, ...]:
    """The names of COCO's 80 classes, in the order of their category ids."""
    from torchvision.models._meta import _COCO_CATEGORIES

    return tuple(name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A"))


def rows_of(state: State, name: str, where: str) -> Tensor:
    """The weight of a layer, which the file must have.

    Raises:
        DistillError: the file has no such tensor, or the tensor is not a weight of a layer.
    """
    if name not in state:
        raise DistillError(
            f"{where}: {name} is missing: the file holds only a part of a detector; download or copy the file again, "
            "or name the file of the whole detector"
        )
    if state[name].dim() < (2 if name.endswith("weight") else 1):
        raise unsupported(where, "layer", f"{name} of shape {tuple(state[name].shape)}")
    return state[name]


def dense_counts(boxes: Tensor, scores: Tensor, where: str) -> tuple[int, int]:
    """Number of classes, and of anchors per cell, of a dense head with the given weights of its last layers.

    Raises:
        DistillError: the weights do not fit each other.
    """
    anchors = len(boxes) // 4
    if not anchors or len(boxes) % 4 or not len(scores) or len(scores) % anchors:
        raise DistillError(
            f"{where}: {len(boxes)} box outputs and {len(scores)} class outputs per cell do not fit each other: "
            "expected 4 box outputs for each anchor, and equally many class outputs for each anchor. The file is "
            "damaged, or belongs to another detector"
        )
    return len(scores) // anchors, anchors


def check_unused(names: list[str], ignored: str, parts: Sequence[str], where: str) -> None:
    """Refuse a file with unknown tensors of a detector, because they would change its results.

    Raises:
        DistillError: lists the tensors.
    """
    unknown = [name for name in names if name.startswith(tuple(parts)) and not re.search(ignored, name)]
    if unknown:
        listed = "; ".join(unknown[:6]) + (" ..." if len(unknown) > 6 else "")
        raise unsupported(where, f"{len(unknown)} unknown tensors", listed)


def check_pooled(inputs: int, channels: int, where: str) -> None:
    """Refuse a box head whose pooled features are not 7x7.

    Raises:
        DistillError: names the box head.
    """
    if inputs != channels * 49:
        raise unsupported(where, "box head", f"{inputs} inputs, expected {channels} channels of 7x7 pooled features")


def note_shared_boxes(found: ForeignDetector, rows: Tensor, classes: int) -> None:
    """Warn that all classes share one box, which is stored as equal rows for all classes."""
    if len(rows) == 4 and classes > 1:
        found.warnings.append(
            "All classes share their box deltas (class-agnostic). A copy is stored for each class: the results "
            "are equal, but further training can make the copies different"
        )


def check_anchors(found: ForeignDetector, per_cell: int, where: str) -> None:
    """Refuse sizes and ratios that do not give the number of anchors in the weights.

    Raises:
        DistillError: gives both numbers.
    """
    if "anchors.sizes" not in found.options:
        expected = 1
    else:
        expected = len(found.options["anchors.sizes"][0]) * len(found.options["anchors.ratios"])
    if per_cell != expected:
        raise DistillError(
            f"{where}: anchors: the weights have {per_cell} anchors per cell, and their sizes and ratios make "
            f"{expected}; give the configuration of the training with --config"
        )
