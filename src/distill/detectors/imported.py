"""The import of a detector of another project: a folder like that of a run, and a report."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.convert.foreign import ForeignDetector
from distill.convert.formats import KNOWN, read_foreign
from distill.detectors.base import Detector
from distill.detectors.foreign_files import find_config, read_config
from distill.detectors.registry import restore_detector
from distill.detectors.student_files import existing_file, save_student
from distill.files import load_tensors, write_text
from distill.run_folder import RunFolder
from distill.types import DistillError

REPORT = "import.json"


def import_detector(
    file: Path, out: Path, config: Path | None = None, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write a detector of another project as a folder that takes the place of a run.

    The folder has `student.pt`, `student.json`, the overrides that `evaluate` needs, and `import.json`, the report. It
    appears whole or not at all.

    Args:
        file: the checkpoint.
        out: the folder, which must not exist.
        config: the configuration of the training; None: what the file holds or what lies beside it.
        classes: class names in label order; None: what the file holds.

    Returns:
        The report: ``project``, ``family``, ``source``, ``sha256``, ``used`` (name in the file -> name here),
        ``unused``, ``missing``, ``filled`` (names here that no tensor of the file has), ``options`` (path -> value and
        where it comes from), ``warnings``.

    Raises:
        DistillError: the file cannot be read or has no known format, its detector cannot be expressed, tensors are
            missing, or the folder cannot be written.
    """
    existing_file(file, "import")
    if out.exists():
        raise DistillError(
            f"{out} exists already, and nothing is overwritten; remove it, or set --out to another folder"
        )
    text = find_config(file) if config is None else read_config(config)
    found = read_foreign(load_tensors(file, foreign=True), str(file), text, classes)
    if found is None:
        raise DistillError(
            f"{file}: expected a checkpoint of {KNOWN}; its tensors have other names. Weights of torchvision, and the "
            "runs of distill, need no import: name them with teacher.weights=… or model.weights=…"
        )
    detector = restore_detector(found.description, found.state, str(file))
    report = _report(found, file)
    try:
        _write(detector, found, report, out)
    except OSError as error:
        raise DistillError(f"{out}: cannot be written ({error}); set --out to a folder that can") from error
    return report


def _report(found: ForeignDetector, file: Path) -> dict[str, Any]:
    return {
        "project": found.project,
        "family": found.family,
        "source": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "used": found.renamed,
        "unused": found.unused,
        "missing": [],  # a file that lacks a tensor is refused
        "filled": sorted(found.state.keys() - set(found.renamed.values())),
        "options": {path: {"value": value, "from": found.facts[path]} for path, value in sorted(found.options.items())},
        "warnings": found.warnings,
    }


def _write(detector: Detector, found: ForeignDetector, report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parent:
        folder = Path(parent, out.name)
        save_student(detector, folder, {"resize": found.resize, "imported": {"project": found.project}})
        resize = [f"data.{name}={json.dumps(value)}" for name, value in found.resize.items()]
        overrides = [f"model={found.family}", "distill=none", *resize]
        write_text(RunFolder(folder).overrides, yaml.safe_dump(overrides))
        write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
        folder.rename(out)
