"""Recognize the format of another project's file by the names of its tensors, and convert the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distill.convert import detectron2, mmdetection
from distill.convert.foreign import ForeignDetector
from distill.convert.python_config import parse_config
from distill.types import DistillError

KNOWN = "Detectron2 (.pkl, .pth) and MMDetection 2.x and 3.x (.pth)"
"""The formats, for messages."""


def read_foreign(
    content: Any, where: str, config: str | None = None, classes: Sequence[str] | None = None
) -> ForeignDetector | None:
    """Convert the content of a file, or return None if it has none of the known formats.

    Args:
        content: what `files.load_tensors` returned.
        where: the file, for messages and for the recipe in its name.
        config: the text of the configuration: Detectron2's YAML or MMDetection's Python. None: the
            configuration in the file.
        classes: class names in label order. None: the names in the file.

    Raises:
        DistillError: the file has a known format, but holds a part of a detector, or one that distill cannot express.
    """
    state = foreign_state(content)
    if state is None:
        return None
    if detectron2.matches(state):
        parsed = None if config is None else detectron2.parse_config(config, f"configuration of {where}")
        return detectron2.convert(state, where, parsed, classes)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    text = meta.get("cfg") or meta.get("config")
    own = parse_config(text) if isinstance(text, str) else None
    foreign_config = config is not None and re.search(r"^MODEL:", config, re.MULTILINE)
    given = None if config is None or foreign_config else parse_config(config)
    if given == {}:
        raise DistillError(
            f"configuration of {where}: not a configuration of MMDetection (Python, such as model = dict(type=…)); "
            "give the file that MMDetection writes to the folder of the training"
        )
    found = mmdetection.convert(state, where, meta, own if given is None else given, classes)
    if foreign_config:
        found.warnings.append(
            "The configuration is one of Detectron2, but the file is one of MMDetection; the configuration was not used"
        )
    return found


def foreign_state(content: Any) -> dict[str, Tensor] | None:
    """The tensors in a file of another project, without prefixes; None if no known format has such names."""
    if not isinstance(content, Mapping):
        return None
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    prefixes = ("module.", "d2_model.")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            continue
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        state[name] = value
    return state if detectron2.matches(state) or mmdetection.matches(state) else None


def is_foreign(content: Any) -> bool:
    """Whether a file has one of the known formats."""
    return foreign_state(content) is not None
