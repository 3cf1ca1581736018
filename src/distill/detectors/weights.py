"""Loading and saving of weights: torchvision's enums, files with a state dict, and the files of a run.

A run writes `student.pt` and `student.json`.
Only tensors are unpickled. `student.json` holds the facts that a state dict lacks: classes, norm and its epsilon,
anchors and pixel statistics. Without these facts, weights load into a network with another norm or other anchors
without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from distill.detectors import anchors
from distill.detectors.backbones import body_state, imagenet_weights
from distill.detectors.base import Detector, check_classes
from distill.detectors.description import FORMAT, leaves, to_current_format
from distill.detectors.norms import set_eps
from distill.detectors.timm import TIMM, timm_network
from distill.files import atomic_write, load_tensors, read_json, write_text
from distill.labels import match_classes
from distill.run_folder import DESCRIPTION, STUDENT, RunFolder
from distill.types import DistillError

State = Mapping[str, Tensor]

MEANING = (
    *("pixels.mean", "pixels.std", "backbone.stride_in_1x1", "anchors.sizes", "anchors.ratios"),
    *("box_sampling_ratio", "p6_from"),
    *anchors.DEFAULTS,
)
"""Dotted paths of options that change the results of weights, although the weights load with any value."""

ADVICE = (
    "Check family, depth, width and head sizes; if only the classes differ, set head=new "
    "(model.head=new, teacher.model.head=new)."
)
"""Advice in the message about weights that do not fit."""


@dataclass(frozen=True)
class Source:
    """Weights of a whole detector, and the known facts about them."""

    name: str
    """File or torchvision's entry, for messages."""
    state: State
    classes: tuple[str, ...] | None = None
    """Class names in label order; None if they are unknown."""
    options: dict[str, Any] = field(default_factory=dict)
    """Dotted path -> value, for the options that are known."""


def save_student(detector: Detector, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a detector to `student.pt` and `student.json`. Each file is written atomically.

    `student.pt` holds torchvision's state dict. `student.json` holds
    ``{"format": 2, "model": describe(), "extra": extra}``.

    Args:
        detector: the detector.
        folder: the run's folder.
        extra: further facts, which `read_extra` returns.

    Returns:
        The path of `student.pt`.
    """
    run = RunFolder(folder)
    text = json.dumps({"format": FORMAT, "model": detector.describe(), "extra": dict(extra or {})}, indent=2) + "\n"
    state = {name: value.detach().cpu().contiguous() for name, value in detector.net.state_dict().items()}
    write_text(run.description, text)
    return atomic_write(run.student, lambda file: torch.save(state, file))


def fit_sizes(module: nn.Module, state: State, where: str) -> None:
    """Raise an error if a module is far larger than its weights. Such a module must not be allocated.

    Raises:
        DistillError: the module has more than 2 n + 1000 values, where `state` has n. The message names `where`.
    """
    wanted, held = (sum(each.numel() for each in of.values()) for of in (module.state_dict(), state))
    if wanted > 2 * held + 1000:
        raise DistillError(
            f"{where}: its {DESCRIPTION} describes {wanted} numbers, and the file holds {held}. {ADVICE}"
        )


def read_extra(path: str | Path) -> dict[str, Any]:
    """Return the further facts in a run's `student.json`, such as category ids and measured values.

    The result is empty if there is no such file or no such entry.
    """
    extra: dict[str, Any] = read_description(weights_file(Path(path)).with_suffix(".json")).get("extra", {})
    return extra


def class_names(classes: Sequence[str] | None, weights: str | None, enum: Any) -> tuple[str, ...]:
    """Return the class names of a new detector: `classes`, or the classes of `weights` if `classes` is None.

    Raises:
        DistillError: neither gives the class names, or the names are invalid.
    """
    if classes is None and weights is not None:
        if entry := _entry(weights, enum):
            classes = _categories(entry)
        else:
            classes = _classes(read_description(weights_file(Path(weights)).with_suffix(".json")))
    if classes is None:
        raise DistillError(f"classes: give the class names; weights={weights} does not tell them")
    return check_classes(classes)


def initialise(detector: Detector, backbone_weights: str | None, weights: str | None, head: str) -> None:
    """Load the weights that a constructor was given, and add to the detector's report.

    Args:
        detector: with random weights.
        backbone_weights: see `load_backbone`; not used if `weights` is given.
        weights: see `load_weights`.
        head: see `load_weights`.
    """
    if weights is not None:
        detector.report += load_weights(detector, weights, head)
    elif backbone_weights is not None:
        detector.report += load_backbone(detector, backbone_weights)


def load_weights(detector: Detector, source: str | Path, head: str = "keep") -> list[str]:
    """Load the weights of a whole detector.

    Args:
        detector: the detector, changed in place.
        source: torchvision's name (``COCO_V1``, or in full ``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``), a file with
            a state dict, or the folder of a run.
        head: what to do if the class lists differ. ``keep`` copies the rows of the detector's classes by exact name,
            and raises an error if a class is missing. ``new`` keeps the random weights of the layers that belong to
            classes.

    Returns:
        Lines for the report that say what was loaded.

    Raises:
        DistillError: the weights cannot be read, do not fit, or were made for other pixel statistics, anchors or
            strides.
    """
    if head not in ("keep", "new"):
        raise DistillError(f"head: expected keep or new, got {head!r}")
    found = _source(str(source), detector)
    _check_meaning(detector, found)
    state, lines = dict(found.state), []
    layers = tuple(f"{layer}." for layer in detector.class_layers)
    if found.classes == detector.classes:
        lines.append(f"head: kept, same {len(detector.classes)} classes")
    elif head == "new":
        state = {name: value for name, value in state.items() if not name.startswith(layers)}
        lines.append(f"head: new, for {len(detector.classes)} classes; the weights were made for {found.classes}")
    elif found.classes is None:
        lines.append("head: kept; the file does not name its classes, so they are taken to be in the same order")
    else:
        state.update(
            class_rows(detector, state, found.classes, "or set head=new (model.head=new) to start the head afresh")
        )
        lines.append(f"head: kept the rows of {', '.join(detector.classes)}, out of {len(found.classes)} classes")
    fit(detector.net, state, found.name, fresh=layers if head == "new" and found.classes != detector.classes else ())
    return [f"weights: {len(state)} tensors from {found.name}", *lines, *_settle_norm(detector, found)]


def load_backbone(detector: Detector, source: str) -> list[str]:
    """Load the ImageNet weights of a classifier into the body.

    Args:
        detector: the detector, changed in place.
        source: torchvision's name (``IMAGENET1K_V1``, ``DEFAULT``) or a file with a classifier's state dict. For a timm
            backbone: ``DEFAULT``, timm's own weights for its name, or a file with the state dict of that network.

    Returns:
        Lines for the report that say what was loaded.

    Raises:
        DistillError: the weights cannot be read or fetched, or do not fit.
    """
    backbone, depth, width = (detector.options["backbone"][name] for name in ("name", "depth", "width"))
    body = detector.net.backbone.body
    if backbone.startswith(TIMM):
        state = _timm_state(backbone.removeprefix(TIMM), source)
    else:
        enum = imagenet_weights(backbone, depth)
        if enum is not None and source in enum.__members__:
            if width != 1:
                raise DistillError(f"backbone.weights: {source} is for width 1, not {width}; give a file or null")
            state = download(enum[source], "backbone.weights")
        else:
            names = ", ".join(enum.__members__) if enum is not None else f"none, for depth {depth}"
            state = read_state(_file(Path(source), f"backbone.weights: torchvision's names are {names}"))
    state = body_state(state, body)
    fit(body, state, source)
    return [f"backbone: {len(state)} tensors from {source}"]


def _timm_state(name: str, source: str) -> State:
    """The state dict of timm's whole classifier.

    A file is loaded into the classifier, because this reports missing and unexpected tensors.
    """
    with torch.random.fork_rng(devices=[]):
        classifier = timm_network(name, pretrained=source == "DEFAULT")
    if source != "DEFAULT":
        fit(classifier, read_state(_file(Path(source), "backbone.weights: timm's name is DEFAULT")), source)
    state: State = classifier.state_dict()
    return state


def fit(
    module: nn.Module,
    state: State,
    where: str,
    fresh: tuple[str, ...] = (),
    what: str = "detector",
    advice: str = ADVICE,
) -> None:
    """Load a state dict into a module. All names and shapes must match.

    Args:
        module: the module, changed in place.
        state: the state dict.
        where: the source of the weights, for the message.
        fresh: prefixes of names that may be missing.
        what: the kind of module, for the message.
        advice: the end of the message.

    Raises:
        DistillError: the message lists missing tensors, unexpected tensors, and tensors of another shape.
    """
    own = module.state_dict()
    missing, unexpected = list(own.keys() - state.keys()), list(state.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not shapes:
        try:  # torchvision renames tensors of older files while it loads: use its report
            missing, unexpected = module.load_state_dict(dict(state), strict=False)
        except RuntimeError as error:
            missing, unexpected, shapes = [], [], [str(error)]
    missing = [name for name in missing if not fresh or not name.startswith(fresh)]
    problems = [
        f"  {len(names)} {kind}: {'; '.join(sorted(names)[:10])}{' ...' if len(names) > 10 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise DistillError("\n".join([f"{where}: the weights do not fit this {what}.", *problems, advice]))


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file: the content itself, or its entry ``model`` or ``state_dict``.

    Common trainers write these entries. A prefix ``module.`` of the names is removed.

    Raises:
        DistillError: the file cannot be read, or it holds no state dict.
    """
    content = load_tensors(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DistillError(f"{path}: expected a state dict (names -> tensors), got {type(content).__name__}")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _source(source: str, detector: Detector) -> Source:
    if entry := _entry(source, detector.enum):
        eps = detector.coco_eps if entry is detector.enum.COCO_V1 else 1e-5
        options = {**anchors.DEFAULTS, "backbone.norm": "frozen", "backbone.norm_eps": eps}
        return Source(str(entry), download(entry, "weights"), _categories(entry), options)
    path = weights_file(Path(source))
    facts = read_description(path.with_suffix(".json"))
    return Source(str(path), read_state(path), _classes(facts), dict(leaves(facts.get("model", {}))))


def _entry(source: str, enum: Any) -> Any:
    """torchvision's entry with the name `source`, or None if torchvision has no such entry."""
    if source in enum.__members__:
        return enum[source]
    try:
        return torchvision.models.get_weight(source)
    except (ValueError, KeyError):
        return None


def _categories(entry: Any) -> tuple[str, ...]:
    """Class names of torchvision's weights, without the first category, which is the background."""
    return tuple(entry.meta["categories"][1:])


def _classes(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    classes = facts.get("model", {}).get("classes")
    return None if classes is None else tuple(classes)


def download(entry: Any, option: str) -> State:
    """Download torchvision's weights, or read them from torch's cache.

    Args:
        entry: a member of torchvision's enum.
        option: the option with which the user chose the entry, for the message.

    Raises:
        DistillError: the weights cannot be fetched. The message says how to provide them without a network.
    """
    try:
        state: State = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or a broken download
        name = Path(entry.url).name
        raise DistillError(
            f"{option}: {entry} could not be fetched ({error}). Get {entry.url} on a machine with a network and set"
            f" {option}=/path/to/{name} (of the student: model.{option}), or put it into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    return state


def weights_file(path: Path) -> Path:
    """Return the file of weights for a path: a run's folder, a `student.json`, or the file itself.

    Raises:
        DistillError: there is no such file.
    """
    path = RunFolder(path).student if path.is_dir() else path.with_suffix(".pt") if path.suffix == ".json" else path
    return _file(path, "weights")


def _file(path: Path, option: str) -> Path:
    if not path.is_file():
        raise DistillError(f"{option}: {path} is neither a file, nor a run's folder with {STUDENT}, nor a known name")
    return path


def read_description(path: Path) -> dict[str, Any]:
    """Read a description, such as `student.json`, in the current format.

    The result is empty if the file does not exist.

    Raises:
        DistillError: the file is invalid, or a newer version of distill wrote it.
    """
    if not path.is_file():
        return {}
    facts = to_current_format(read_json(path), str(path))
    if not all(isinstance(facts.get(key, {}), dict) for key in ("model", "extra")):
        raise DistillError(f"{path}: expected an object with the detector's facts under 'model'")
    classes = facts.get("model", {}).get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DistillError(f"{path}: expected a list of names as 'classes' of the model")
    return facts


def _check_meaning(detector: Detector, found: Source) -> None:
    mine, theirs = dict(leaves(detector.options)), found.options
    differing = [
        f"{name}={theirs[name]} (here {mine[name]})"
        for name in MEANING
        if name in theirs and name in mine and theirs[name] != mine[name]
    ]
    if differing:
        raise DistillError(f"{found.name}: these weights were made for {'; '.join(differing)}. Set the model to match")


def class_rows(detector: Detector, state: State, classes: Sequence[str], remedy: str) -> dict[str, Tensor]:
    """Select the rows of the detector's classes, in the detector's order, from every layer that belongs to classes.

    Args:
        detector: the detector that will load the rows.
        state: a state dict that was made for `classes`.
        classes: class names in label order.
        remedy: the end of the message if a class is missing.

    Returns:
        Name of a weight or bias -> its selected rows.

    Raises:
        DistillError: a class of the detector is not in `classes`.
    """
    chosen, taken = torch.tensor(match_classes(detector.classes, classes, remedy)), {}
    for layer, rows in detector.class_layers.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in state or len(state[name]) % ((len(classes) + 1) * rows):
                continue  # `fit` reports the error
            split = state[name].reshape(-1, len(classes) + 1, rows, *state[name].shape[1:])
            taken[name] = split[:, chosen].flatten(0, 2)
    return taken


def _settle_norm(detector: Detector, found: Source) -> list[str]:
    """Set the epsilon that the weights need. Return report lines about the epsilon and the kind of norm."""
    lines, mine = [], detector.options["backbone"]
    norm, eps = (found.options.get(f"backbone.{name}") for name in ("norm", "norm_eps"))
    if norm not in (None, mine["norm"]):
        lines.append(f"norm: {mine['norm']} here; the weights were made with {norm}")
    if eps not in (None, mine["norm_eps"]) and mine["norm"] in ("frozen", "batch_fixed_stats"):
        mine["norm_eps"] = eps
        set_eps(detector.net, mine["norm_eps"])
        lines.append(f"norm_eps: {mine['norm_eps']}, as the weights need it")
    return lines
