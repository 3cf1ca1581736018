"""The table of detector families, and detectors rebuilt from what a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.detectors.base import Detector
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.mask_rcnn import MaskRCNN
from distill.detectors.retinanet import RetinaNet
from distill.detectors.weights import fit, fit_sizes, read_description, read_state, weights_file
from distill.run_folder import DESCRIPTION
from distill.type_checks import type_errors
from distill.types import DistillError

FAMILIES: dict[str, type[Detector]] = {family.family: family for family in (FasterRCNN, MaskRCNN, RetinaNet, FCOS)}
"""Family name -> class. A new family is one line here."""


def load_detector(path: str | Path) -> Detector:
    """The detector that a run's folder, or its `student.pt` or `student.json`, holds."""
    weights = weights_file(Path(path))
    model, state = read_description(weights.with_suffix(".json")).get("model"), read_state(weights)
    return restore_detector(model, state, str(weights))


def restore_detector(model: Any, state: dict[str, torch.Tensor], where: str) -> Detector:
    """The detector that a description and its weights belong to; `where` names their file in messages."""
    with torch.device("meta"):  # takes no memory, whatever a file from outside asks for
        fit_sizes(described(model, where).net, state, where)
    detector = described(model, where)
    fit(detector.net, state, where)
    return detector


def described(model: Any, where: str) -> Detector:
    """The detector that a description, as `describe` gives it, speaks of; its weights are yet to be loaded."""
    if not isinstance(model, dict) or not isinstance(model.get("family"), str) or model["family"] not in FAMILIES:
        raise DistillError(
            f"{where}: expected {DESCRIPTION} beside it, naming one of {', '.join(FAMILIES)} as its model; for bare weights"
            " build the detector and give it weights=FILE"
        )
    options = {name: value for name, value in model.items() if name != "family"}
    if wrong := type_errors(FAMILIES[model["family"]], options):
        raise DistillError(f"{DESCRIPTION} of {where}: {'; '.join(wrong)}")
    try:
        with torch.random.fork_rng(devices=[]):  # its start values are thrown away: they must not cost a draw
            detector: Detector = FAMILIES[model["family"]](**options)
    except DistillError:
        raise
    except Exception as error:  # a file may say anything
        raise DistillError(f"{DESCRIPTION} of {where}: not written by this version of distill: {error}") from error
    return detector
