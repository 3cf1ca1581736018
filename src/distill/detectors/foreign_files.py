"""Files of other projects: the configuration beside them, warnings about what no file tells, and the import."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from distill.convert.foreign import ForeignDetector
from distill.files import read_text
from distill.types import DistillError

CONFIG = "config.yaml"
"""The configuration that Detectron2's trainer writes beside its checkpoints."""
LARGEST = 2**20
"""Bytes of a configuration at most."""


def find_config(file: Path) -> str | None:
    """The text of Detectron2's configuration beside a file of weights; None if there is none.

    The run folders of distill have a file of the same name, without Detectron2's key ``MODEL``.
    """
    path = file.parent / CONFIG
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None
    text = read_config(path)
    return text if re.search(r"^MODEL:\s*$", text, re.MULTILINE) else None


def read_config(path: Path) -> str:
    """Read the text of a configuration.

    Raises:
        DistillError: the file cannot be read.
    """
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise DistillError(f"{path}: not a text file ({error}); give the configuration of the training") from error


def warn_of_assumptions(found: ForeignDetector, file: Path) -> None:
    """Warn of what a file does not tell."""
    sentences = " ".join(f"({number}) {line.removesuffix('.')}." for number, line in enumerate(found.warnings, start=1))
    warnings.warn(
        f"{file}: read as a {found.family} of {found.project}. {sentences} `python -m distill import {file}` writes a "
        "folder with all options, and a report",
        stacklevel=3,
    )
