"""The files of a student in a run's folder: `student.pt`, `student.json` and the checkpoints.

`student.json` holds the facts that a state dict lacks: classes, norm and its epsilon, anchors and pixel statistics.
Without these facts, weights load into a network with another norm or other anchors without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.convert.formats import read_foreign
from distill.detectors.base import Detector
from distill.detectors.description import FORMAT, checkpoint_model, to_current_format
from distill.detectors.foreign_files import find_config, warn_of_assumptions
from distill.detectors.state_dicts import extract_state, without_tied
from distill.files import atomic_write, load_tensors, read_json, write_text
from distill.run_folder import DESCRIPTION, STUDENT, RunFolder
from distill.types import DistillError

SAFETENSORS = ".safetensors"


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
    state = {name: value.detach().cpu().contiguous() for name, value in detector.net.state_dict().items()}
    write_text(run.description, _description(detector, extra))
    return atomic_write(run.student, lambda file: torch.save(state, file))


def save_safetensors(detector: Detector, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a detector as `save_student` does, with its weights in `student.safetensors`.

    `load_detector` reads the folder. Other programs read the weights without torch, and without unpickling anything.

    Args:
        detector: the detector.
        folder: an existing folder or a new one.
        extra: further facts, which `read_extra` returns.

    Raises:
        DistillError: safetensors is not installed.

    Returns:
        The path of `student.safetensors`.
    """
    run, (save, _) = RunFolder(folder), _safetensors()
    state = {name: value.detach().cpu().contiguous() for name, value in without_tied(detector.net).items()}
    write_text(run.description, _description(detector, extra))
    content = save(state, {"format": "pt"})
    return atomic_write(run.student.with_suffix(SAFETENSORS), lambda file: file.write(content))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        DistillError: safetensors is not installed, or the file is damaged.
    """
    _, load = _safetensors()
    try:
        tensors: dict[str, Tensor] = load(path.read_bytes())
    except Exception as error:  # its errors are not documented
        raise DistillError(f"{path}: not a file of safetensors ({error}); write or copy the file again") from error
    return tensors


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors.torch import load, save
    except ImportError as error:
        raise DistillError(
            "safetensors is not installed: pip install 'distill[hub]', or uv pip install 'distill[hub]'"
        ) from error
    return save, load


def _description(detector: Detector, extra: Mapping[str, Any] | None) -> str:
    return json.dumps({"format": FORMAT, "model": detector.describe(), "extra": dict(extra or {})}, indent=2) + "\n"


def read_extra(path: str | Path) -> dict[str, Any]:
    """Return the further facts in a run's `student.json`, such as category ids and measured values.

    The result is empty if there is no such file or no such entry.
    """
    extra: dict[str, Any] = read_description(weights_file(Path(path)).with_suffix(".json")).get("extra", {})
    return extra


def trained_category_ids(extra: Mapping[str, Any], source: Path) -> dict[int, int]:
    """Label -> category id of the training data; empty if the facts of a detector do not tell.

    Args:
        extra: the further facts, see `read_extra`.
        source: the file, for the message.

    Raises:
        DistillError: the entry has another form.
    """
    try:
        return {int(label): int(number) for label, number in extra.get("category_ids", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DistillError(f"{source}: expected 'category_ids' in its {DESCRIPTION}: {error}") from error


class DetectorFile(NamedTuple):
    """A detector as a file describes it."""

    model: Any
    """The description as `Detector.describe` returns it. None for a plain file of weights."""
    state: dict[str, Tensor]
    """torchvision's state dict."""
    resize: Mapping[str, Any]
    """Options of the resize in its training, see `imaging.resizing.ResizeOptions`."""


def read_detector(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the description and the weights of a detector, see `read_file`."""
    return read_file(path)[:2]


def read_file(path: Path) -> DetectorFile:
    """Read a detector.

    Args:
        path: a run's folder, an exported student, a checkpoint of a run, a file of another project (see
            `convert.formats`), or a plain file of weights.

    Raises:
        DistillError: a file is missing or invalid.
    """
    file = weights_file(path)
    content: Any = load_safetensors(file) if file.suffix == SAFETENSORS else load_tensors(file, foreign=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        prefix = "student.net."
        state = {
            name.removeprefix(prefix): value
            for name, value in content["state_dict"].items()
            if str(name).startswith(prefix) and isinstance(value, Tensor)
        }
        if state:
            model = checkpoint_model(content, str(file))
            model = None if model is None else _validated({"model": model}, file)["model"]
            return DetectorFile(model, state, read_extra(file).get("resize", {}))
    description = read_description(file.with_suffix(".json"))
    if "model" not in description and (found := read_foreign(content, str(file), find_config(file))):
        warn_of_assumptions(found, file)
        return DetectorFile(found.description, found.state, found.resize)
    resize = description.get("extra", {}).get("resize", {})
    return DetectorFile(description.get("model"), extract_state(content, file), resize)


def read_description(path: Path) -> dict[str, Any]:
    """Read a description, such as `student.json`, in the current format.

    The result is empty if the file does not exist.

    Raises:
        DistillError: the file is invalid, or a newer version of distill wrote it.
    """
    if not path.is_file():
        return {}
    return _validated(to_current_format(read_json(path), str(path)), path)


def _validated(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    if not all(isinstance(facts.get(key, {}), dict) for key in ("model", "extra")):
        raise DistillError(f"{path}: expected an object with the detector's facts under 'model'")
    classes = facts.get("model", {}).get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DistillError(f"{path}: expected a list of names as 'classes' of the model")
    return facts


def weights_file(path: Path) -> Path:
    """Return the file of weights for a path: a run's folder, a `student.json`, or the file itself.

    Raises:
        DistillError: there is no such file.
    """
    path = RunFolder(path).student if path.is_dir() else path.with_suffix(".pt") if path.suffix == ".json" else path
    if not path.is_file() and path.with_suffix(SAFETENSORS).is_file():
        path = path.with_suffix(SAFETENSORS)
    return existing_file(path, "weights")


def existing_file(path: Path, option: str) -> Path:
    """Return `path`.

    Raises:
        DistillError: there is no such file. The message names `option`.
    """
    if not path.is_file():
        raise DistillError(f"{option}: {path} is neither a file, nor a run's folder with {STUDENT}, nor a known name")
    return path
