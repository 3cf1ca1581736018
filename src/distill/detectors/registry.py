"""The detector families, and the reconstruction of a detector from the files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.detectors.base import Detector
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.mask_rcnn import MaskRCNN
from distill.detectors.retinanet import RetinaNet
from distill.detectors.state_dicts import fit, fit_sizes
from distill.detectors.student_files import read_detector, read_extra, weights_file
from distill.imaging.resizing import read_resize_options
from distill.run_folder import DESCRIPTION
from distill.type_checks import type_errors
from distill.types import DistillError

FAMILIES: dict[str, type[Detector]] = {family.family: family for family in (FasterRCNN, MaskRCNN, RetinaNet, FCOS)}
"""Family name -> class. A new family adds one entry."""


def load_detector(path: str | Path) -> Detector:
    """Load the detector of a run, with the resize of its training.

    Args:
        path: the run's folder, its `student.pt` or `student.json`, or one of its checkpoints.

    Raises:
        DistillError: a file is missing or invalid, or the weights do not fit the description.
    """
    file = weights_file(Path(path))
    detector = restore_detector(*read_detector(file), str(file))
    try:
        detector.resize = read_resize_options(read_extra(file).get("resize", {}))
    except DistillError as error:
        raise DistillError(f"{DESCRIPTION} of {file}: {error}") from error
    return detector


def restore_detector(model: Any, state: dict[str, torch.Tensor], where: str) -> Detector:
    """Build the detector of a description and load its weights.

    Args:
        model: the description, as `Detector.describe` returns it.
        state: torchvision's state dict.
        where: the file of the weights, for messages.

    Raises:
        DistillError: the description is invalid, or the weights do not fit.
    """
    with torch.device("meta"):  # allocates no memory, however large a detector an untrusted file describes
        fit_sizes(detector_from_description(model, where).net, state, where)
    detector = detector_from_description(model, where)
    fit(detector.net, state, where)
    return detector


def detector_from_description(model: Any, where: str) -> Detector:
    """Build the detector of a description, as `Detector.describe` returns it. Its weights are random.

    Raises:
        DistillError: the description is invalid. The message names the file `where`.
    """
    if not isinstance(model, dict) or not isinstance(model.get("family"), str) or model["family"] not in FAMILIES:
        raise DistillError(
            f"{where}: expected {DESCRIPTION} beside it, naming one of {', '.join(FAMILIES)} as its model; for bare"
            " weights build the detector and give it weights=FILE"
        )
    options = {name: value for name, value in model.items() if name != "family"}
    if wrong := type_errors(FAMILIES[model["family"]], options):
        raise DistillError(f"{DESCRIPTION} of {where}: {'; '.join(wrong)}")
    try:
        with torch.random.fork_rng(devices=[]):  # the random weights are not kept: restore the random state
            detector: Detector = FAMILIES[model["family"]](**options)
    except DistillError:
        raise
    except Exception as error:  # the file is untrusted: its options may fail anywhere in a constructor
        raise DistillError(f"{DESCRIPTION} of {where}: not written by this version of distill: {error}") from error
    return detector
