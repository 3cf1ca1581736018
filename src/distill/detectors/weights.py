"""Loading of weights into a detector: of a whole detector, or of the backbone's body."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.detectors import anchors
from distill.detectors.backbones import body_state, imagenet_weights
from distill.detectors.base import Detector, check_classes
from distill.detectors.class_layers import class_rows, known_class_rows
from distill.detectors.norms import set_eps
from distill.detectors.state_dicts import State, fit, read_state
from distill.detectors.student_files import existing_file, read_detector, weights_file
from distill.detectors.timm import TIMM, timm_network
from distill.detectors.torchvision_weights import (
    categories,
    coco_eps,
    download,
    entry_options,
    find_entry,
    is_coco_state,
)
from distill.type_checks import leaves
from distill.types import DistillError

HEADS = ("keep", "match", "new")
"""Values of the option `head`, see `load_weights`."""

MEANING = (
    *("pixels.mean", "pixels.std", "backbone.stride_in_1x1", "anchors.sizes", "anchors.ratios"),
    *("box_sampling_ratio", "p6_from", "backbone.groups", "backbone.group_width"),
    *("input_stride", "neck_norm", "rpn_convs", "box_convs", "head_norm", "box_head"),
    *("strides", "encoder_heads", "encoder_expansion", "encoder_depth", "decoder_heads", "decoder_points"),
    *("bins", "bin_curve", "version", "encoder", "gateway", "share_box_head"),
    *("windows", "self_heads", "cross_heads"),
    *anchors.DEFAULTS,
)
"""Dotted paths of options that change the results of weights, although the weights load with any value."""
OLDER = {"input_stride": 1}
"""Values of options that older descriptions, and torchvision, do not have."""


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


def class_names(classes: Sequence[str] | None, weights: str | None, enum: Any) -> tuple[str, ...]:
    """Return the class names of a new detector: `classes`, or the classes of `weights` if `classes` is None.

    Raises:
        DistillError: neither gives the class names, or the names are invalid.
    """
    if classes is None and weights is not None:
        if entry := find_entry(weights, enum):
            classes = categories(entry)
        else:
            model, _ = read_detector(Path(weights))
            classes = None if model is None else model.get("classes")
    if classes is None:
        raise DistillError(f"classes: give the class names; weights={weights} does not tell them")
    return check_classes(classes)


def initialize(detector: Detector, backbone_weights: str | None, weights: str | None, head: str) -> None:
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
            a state dict, a run's folder, or a checkpoint of a run. A file with the number of outputs of torchvision's
            COCO weights has their class names.
        head: what to do if the class lists differ. ``keep`` copies the rows of the detector's classes by exact name,
            and raises an error if a class is missing. ``match`` also copies rows by name; the rows of missing classes
            keep their random weights. ``new`` keeps the random weights of all layers that belong to classes.

    Returns:
        Lines for the report that say what was loaded.

    Raises:
        DistillError: the weights cannot be read, do not fit, or were made for other pixel statistics, anchors or
            strides.
    """
    if head not in HEADS:
        raise DistillError(f"head: expected {', '.join(HEADS[:-1])} or {HEADS[-1]}, got {head!r}")
    weights = read_source(str(source), detector)
    _check_meaning(detector, weights)
    state, lines = dict(weights.state), []
    layers = tuple(f"{layer}." for layer in detector.class_layers)
    if weights.classes == detector.classes:
        lines.append(f"head: kept, same {len(detector.classes)} classes")
    elif head == "new":
        state = {name: value for name, value in state.items() if not name.startswith(layers)}
        lines.append(f"head: new, for {len(detector.classes)} classes; the weights were made for {weights.classes}")
    elif weights.classes is None and head == "match":
        raise DistillError(
            f"{weights.name}: head=match needs the class names of the weights, and the file does not name them. Use "
            "the run's folder or its checkpoint, head=keep if the classes are the same, or head=new"
        )
    elif weights.classes is None:
        lines.append("head: kept; the file does not name its classes, so they are taken to be in the same order")
    elif head == "match":
        state.update(known_class_rows(detector, state, weights.classes))
        known = [name for name in detector.classes if name in weights.classes]
        new = [name for name in detector.classes if name not in weights.classes]
        lines.append(f"head: kept the rows of {', '.join(known)}; new: {', '.join(new) or 'none'}")
    else:
        remedy = (
            "or let a student start the missing classes afresh with model.head=match, all classes with model.head=new; "
            "a teacher must know all classes"
        )
        state.update(class_rows(detector, state, weights.classes, remedy))
        lines.append(f"head: kept the rows of {', '.join(detector.classes)}, out of {len(weights.classes)} classes")
    fit(
        detector.net, state, weights.name, fresh=layers if head == "new" and weights.classes != detector.classes else ()
    )
    return [f"weights: {len(state)} tensors from {weights.name}", *lines, *_apply_norm_eps(detector, weights)]


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
    body = detector.body
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
            state = read_state(existing_file(Path(source), f"backbone.weights: torchvision's names are {names}"))
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
        fit(classifier, read_state(existing_file(Path(source), "backbone.weights: timm's name is DEFAULT")), source)
    state: State = classifier.state_dict()
    return state


def read_source(source: str, detector: Detector) -> Source:
    """Read the weights of a whole detector from a library or a file, with the facts that are known about them."""
    published: Source | None = detector.read_published(source)
    if published is not None:
        return published
    if entry := find_entry(source, detector.enum):
        eps = detector.coco_eps if entry is detector.enum.COCO_V1 else 1e-5
        known = {"backbone.norm": "frozen", "backbone.norm_eps": eps, **entry_options(entry)}
        options = {**OLDER, **anchors.DEFAULTS, **known}
        return Source(str(entry), download(entry, "weights"), categories(entry), options)
    file = str(weights_file(Path(source)))
    model, state = read_detector(Path(file))
    if model is not None:
        options = {**OLDER, **dict(leaves(model))}
        return Source(file, state, tuple(model["classes"]) if "classes" in model else None, options)
    if is_coco_state(detector, state):
        options = {**OLDER, **anchors.DEFAULTS, "backbone.norm_eps": coco_eps(detector, state, file)}
        return Source(f"{file} (torchvision's COCO classes)", state, categories(detector.enum.COCO_V1), options)
    return Source(file, state)


def _check_meaning(detector: Detector, source: Source) -> None:
    options = dict(leaves(detector.options))
    names = [
        name for name in MEANING if name in source.options and name in options and source.options[name] != options[name]
    ]
    if names:
        differing = "; ".join(f"{name}={source.options[name]} (here {options[name]})" for name in names)
        words = " ".join(f"'model.{name}={json.dumps(source.options[name])}'" for name in names)
        raise DistillError(
            f"{source.name}: these weights were made for {differing}. Set the model to match: {words} (of a teacher: "
            "teacher.model.…)"
        )


def _apply_norm_eps(detector: Detector, source: Source) -> list[str]:
    """Set the epsilon that the weights need. Return report lines about the epsilon and the kind of norm."""
    lines, backbone = [], detector.options["backbone"]
    norm, eps = (source.options.get(f"backbone.{name}") for name in ("norm", "norm_eps"))
    if norm not in (None, backbone["norm"]):
        lines.append(f"norm: {backbone['norm']} here; the weights were made with {norm}")
    if eps not in (None, backbone["norm_eps"]) and backbone["norm"] in ("frozen", "batch_fixed_stats"):
        backbone["norm_eps"] = eps
        set_eps(detector.net, eps)
        lines.append(f"norm_eps: {eps}, as the weights need it")
    return lines
