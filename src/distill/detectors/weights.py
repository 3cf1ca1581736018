"""Weights in and out: torchvision's enums, plain files, and what a run of ours leaves, `student.pt` + `student.json`.

Only tensors are ever unpickled. What a state dict cannot say (classes, norm and its epsilon, anchors, pixel
statistics) travels in the JSON beside it, because weights load into another norm or other anchors without a word.
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
"""Dotted paths of options that weights depend on although they fit any value of them."""

ADVICE = "Check family, depth, width and head sizes; if only the classes differ, set head=new (model.head=new, teacher.model.head=new)."


@dataclass(frozen=True)
class Source:
    """Weights of a whole detector, and what is known of them."""

    name: str
    state: State
    classes: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """By dotted path, as far as they are known."""


def save_student(detector: Detector, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `student.pt`, torchvision's state dict, and `student.json`: ``{"format": 2, "model": describe(), "extra": extra}``.

    Each file appears whole or not at all. Returns the path of `student.pt`.
    """
    run = RunFolder(folder)
    text = json.dumps({"format": FORMAT, "model": detector.describe(), "extra": dict(extra or {})}, indent=2) + "\n"
    state = {name: value.detach().cpu().contiguous() for name, value in detector.net.state_dict().items()}
    write_text(run.description, text)
    return atomic_write(run.student, lambda file: torch.save(state, file))


def fit_sizes(module: nn.Module, state: State, where: str) -> None:
    """Refuse to make a module that is far larger than the weights that are there for it.

    Raises:
        DistillError: it has more than twice as many numbers.
    """
    wanted, held = (sum(each.numel() for each in of.values()) for of in (module.state_dict(), state))
    if wanted > 2 * held + 1000:
        raise DistillError(
            f"{where}: its {DESCRIPTION} describes {wanted} numbers, and the file holds {held}. {ADVICE}"
        )


def read_extra(path: str | Path) -> dict[str, Any]:
    """What a run wrote beside its detector's facts: category ids, measured values; empty where there is nothing."""
    extra: dict[str, Any] = read_description(weights_file(Path(path)).with_suffix(".json")).get("extra", {})
    return extra


def class_names(classes: Sequence[str] | None, weights: str | None, enum: Any) -> tuple[str, ...]:
    """The class list to build for: the given one, or else the one that belongs to `weights`."""
    if classes is None and weights is not None:
        if entry := _entry(weights, enum):
            classes = _categories(entry)
        else:
            classes = _classes(read_description(weights_file(Path(weights)).with_suffix(".json")))
    if classes is None:
        raise DistillError(f"classes: give the class names; weights={weights} does not tell them")
    return check_classes(classes)


def initialise(detector: Detector, backbone_weights: str | None, weights: str | None, head: str) -> None:
    """Load what a constructor was told to, and settle the detector's options and report."""
    if weights is not None:
        detector.report += load_weights(detector, weights, head)
    elif backbone_weights is not None:
        detector.report += load_backbone(detector, backbone_weights)


def load_weights(detector: Detector, source: str | Path, head: str = "keep") -> list[str]:
    """Load a whole detector's weights; returns lines that say what was taken.

    Args:
        source: torchvision's name (``COCO_V1``, or in full ``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``), a file with
            a state dict, or the folder of a run.
        head: where the class lists differ, ``keep`` takes over the rows of the detector's classes by exact name and
            refuses if one is missing, ``new`` leaves the layers that belong to classes as they are, freshly drawn.

    Raises:
        DistillError: unreadable, not fitting, or made for other pixel statistics, anchors or strides.
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
    """Load ImageNet weights into the body: torchvision's name (``IMAGENET1K_V1``, ``DEFAULT``) or a classifier's file.

    A timm backbone takes ``DEFAULT``, those of timm's own for its name, or a file of that network.
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
    """The state dict of timm's whole classifier, which tells what a file lacks or has too much."""
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
    """Strictly load `state`; only names that begin with one of `fresh` may be missing. `what` and `advice` are for the error.

    Raises:
        DistillError: listing what is missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    missing, unexpected = list(own.keys() - state.keys()), list(state.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not shapes:
        try:  # torchvision translates names of older files while it loads, so what it reports counts
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
    """The state dict in a file: bare, or under ``model`` or ``state_dict`` as common trainers write it."""
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
    """torchvision's entry of that name, or None if it is none of its names."""
    if source in enum.__members__:
        return enum[source]
    try:
        return torchvision.models.get_weight(source)
    except (ValueError, KeyError):
        return None


def _categories(entry: Any) -> tuple[str, ...]:
    """The class names of torchvision's weights; the first category is the background."""
    return tuple(entry.meta["categories"][1:])


def _classes(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    classes = facts.get("model", {}).get("classes")
    return None if classes is None else tuple(classes)


def download(entry: Any, option: str) -> State:
    """The state dict of an entry of torchvision's; `option` is where the user gave its name."""
    try:
        state: State = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or a broken download
        name = Path(entry.url).name
        raise DistillError(
            f"{option}: {entry} could not be fetched ({error}). Get {entry.url} on a machine with a network and set"
            f" {option}=/path/to/{name} (of the student: model.{option}), or put it into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return state


def weights_file(path: Path) -> Path:
    """The file of weights that is meant by a run's folder, by its JSON, or by itself."""
    path = RunFolder(path).student if path.is_dir() else path.with_suffix(".pt") if path.suffix == ".json" else path
    return _file(path, "weights")


def _file(path: Path, option: str) -> Path:
    if not path.is_file():
        raise DistillError(f"{option}: {path} is neither a file, nor a run's folder with {STUDENT}, nor a known name")
    return path


def read_description(path: Path) -> dict[str, Any]:
    """The description beside a file of weights, in today's format; empty where there is none.

    Raises:
        DistillError: unreadable, or written by a newer version.
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
    """The rows that belong to the detector's classes, in their order, of every layer that belongs to classes.

    `state` was made for `classes`; where a class of the detector is not among them, the error ends with `remedy`.
    """
    chosen, taken = torch.tensor(match_classes(detector.classes, classes, remedy)), {}
    for layer, rows in detector.class_layers.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in state or len(state[name]) % ((len(classes) + 1) * rows):
                continue  # fit() names what is wrong
            split = state[name].reshape(-1, len(classes) + 1, rows, *state[name].shape[1:])
            taken[name] = split[:, chosen].flatten(0, 2)
    return taken


def _settle_norm(detector: Detector, found: Source) -> list[str]:
    """Take over the epsilon that the weights were trained with, and say where the kind of norm changes."""
    lines, mine = [], detector.options["backbone"]
    norm, eps = (found.options.get(f"backbone.{name}") for name in ("norm", "norm_eps"))
    if norm not in (None, mine["norm"]):
        lines.append(f"norm: {mine['norm']} here; the weights were made with {norm}")
    if eps not in (None, mine["norm_eps"]) and mine["norm"] in ("frozen", "batch_fixed_stats"):
        mine["norm_eps"] = eps
        set_eps(detector.net, mine["norm_eps"])
        lines.append(f"norm_eps: {mine['norm_eps']}, as the weights need it")
    return lines
