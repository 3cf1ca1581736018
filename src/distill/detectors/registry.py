"""The detector families, and the reconstruction of a detector from the files of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from distill import plugins
from distill.detectors.base import Detector, import_path
from distill.detectors.deimv2 import DEIMv2
from distill.detectors.dfine import DFine
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.mask_rcnn import MaskRCNN
from distill.detectors.retinanet import RetinaNet
from distill.detectors.rfdetr import RFDETR
from distill.detectors.rtdetr import RTDETR
from distill.detectors.state_dicts import fit, fit_sizes
from distill.detectors.student_files import read_description, read_file, weights_file
from distill.imaging.resizing import read_resize_options
from distill.run_folder import DESCRIPTION
from distill.type_checks import type_errors
from distill.types import DistillError

FAMILIES: dict[str, type[Detector]] = {
    family.family: family for family in (FasterRCNN, MaskRCNN, RetinaNet, FCOS, RTDETR, DFine, DEIMv2, RFDETR)
}
"""Family name -> class. A new family of distill adds one entry; other families are named by the path of their class."""
CHECKPOINT = ".ckpt"


def load_detector(path: str | Path) -> Detector:
    """Load the detector of a run, with the resize of its training.

    Args:
        path: the run's folder, its `student.pt` or `student.json`, one of its checkpoints, or a file of another project
            (see `convert.formats`).

    Raises:
        DistillError: a file is missing or invalid, or the weights do not fit the description.
    """
    file = weights_file(Path(path))
    content = read_file(file)
    detector = restore_detector(content.model, content.state, str(file))
    try:
        detector.resize = read_resize_options(content.resize, detector.resize)
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


def described_model(path: str | Path) -> tuple[type[Detector], Mapping[str, Any]] | None:
    """Class and options of the detector that files describe; None for weights without a description.

    Args:
        path: as for `load_detector`. The weights are read only if it is a checkpoint.

    Raises:
        DistillError: a file is missing or invalid, or its class may not be imported.
    """
    file = weights_file(Path(path))
    if file.suffix == CHECKPOINT:
        facts = file.stat()
        model = _checkpoint_model(file.resolve(), (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    else:
        model = read_description(file.with_suffix(".json")).get("model")
    return None if model is None else (_family(model.get("family"), str(file)), model)


@lru_cache(maxsize=8)
def _checkpoint_model(file: Path, _version: tuple[int, ...]) -> Any:
    """The description in a checkpoint. `_version` differs if the file was replaced or changed: it is read again."""
    return read_file(file).model


def detector_from_description(model: Any, where: str) -> Detector:
    """Build the detector of a description, as `Detector.describe` returns it. Its weights are random.

    Raises:
        DistillError: the description is invalid. The message names the file `where`.
    """
    family = _family(model.get("family") if isinstance(model, dict) else None, where)
    options = {name: value for name, value in model.items() if name != "family"}
    if wrong := type_errors(family, options):
        raise DistillError(f"{DESCRIPTION} of {where}: {'; '.join(wrong)}")
    try:
        with torch.random.fork_rng(devices=[]):  # the random weights are not kept: restore the random state
            detector: Detector = family(**options)
    except DistillError:
        raise
    except Exception as error:  # the file is untrusted: its options may fail anywhere in a constructor
        raise DistillError(f"{DESCRIPTION} of {where}: not written by this version of distill: {error}") from error
    return detector


def _family(name: Any, where: str) -> type[Detector]:
    """The class of a family's name, or of the path of a class outside of distill.

    A file of unknown origin names the class. So it is imported only from a plugin or a trusted package. A class that
    the program itself has imported is known already.

    Raises:
        DistillError: there is no such family, or its class may not be imported.
    """
    if not isinstance(name, str) or ("." not in name and name not in FAMILIES):
        raise DistillError(
            f"{where}: expected {DESCRIPTION} beside it, naming one of {', '.join(FAMILIES)} as its model; for bare"
            " weights build the detector and give it weights=FILE"
        )
    if name in FAMILIES:
        return FAMILIES[name]
    if imported := next((kind for kind in _subclasses(Detector) if import_path(kind) == name), None):
        return imported
    if not plugins.is_trusted(name):
        raise DistillError(
            f"{where}: the detector is a {name}, which is not part of distill. If you know this class and want it to "
            f"run, add trust=[{name.partition('.')[0]}] to the command line, import the class first in Python, or "
            f"install its package with an entry point in the group {plugins.GROUP}"
        )
    try:
        kind = plugins.import_trusted(name)
    except Exception as error:  # the import of a user's module may raise anything
        raise DistillError(f"{where}: the detector is a {name}, which cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Detector)):
        raise DistillError(f"{where}: {name} is not a subclass of distill.Detector")
    return kind


def _subclasses(kind: type[Detector]) -> Iterator[type[Detector]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)
