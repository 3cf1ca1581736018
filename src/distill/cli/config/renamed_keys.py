"""Configuration keys, values and class paths that were renamed since version 0.1.0.

Overrides that a run recorded are translated. On the command line a renamed key or value is refused, with its new name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import yaml

from distill.detectors.description import renamed_option
from distill.types import DistillError

TARGETS = {
    "callbacks.averaging.Average": "WeightAverage",
    "callbacks.panels.Panels": "PredictionImages",
    "callbacks.processes.patience": "training.callbacks.consistency.exchange_timeout",
    "callbacks.resume.Best": "BestCheckpoint",
    "callbacks.resume.Last": "LastCheckpoint",
    "callbacks.teacher.TeacherCheck": "TeacherCheck",
    "callbacks.terms.TermCheck": "TermCheck",
    "classifier.Classifier": "Classifier",
    "detectors.anchor_free.FCOS": "FCOS",
    "detectors.one_stage.RetinaNet": "RetinaNet",
    "detectors.two_stage.FasterRCNN": "FasterRCNN",
    "guard.Guard": "NonFiniteGuard",
    "metrics.coco.CocoMetric": "CocoMetric",
    "metrics.voc.VocMetric": "VocMetric",
    "optimization.Schedule": "Schedule",
}
"""Path of a class or function that moved since version 0.1.0 -> its current path, both below ``distill``."""

_TARGET = re.compile(rf"\bdistill\.({'|'.join(map(re.escape, TARGETS))})\b")
_MODEL_KEY = re.compile(r"([+~]*(?:teacher\.)?model\.)(\w+)")
_QUOTES = "'\""


def translated(override: str) -> str:
    """Translate an override of version 0.1.0 to the current keys, values and class paths."""
    key, equals, value = override.partition("=")
    value = _TARGET.sub(lambda match: f"distill.{TARGETS[match[1]]}", value)
    if key.lstrip("+") == "teacher.run":
        value = _translated_list(value)
    elif match := _MODEL_KEY.fullmatch(key):
        path, _ = renamed_option(match[2], value)
        if not value.startswith("{"):  # a mapping already has the current form
            key = match[1] + path
            value = ",".join(_renamed_value(match[2], text) for text in value.split(","))
    return key + equals + value


def _renamed_value(option: str, text: str) -> str:
    bare = text.strip(_QUOTES)
    _, value = renamed_option(option, bare)
    return text if value == bare else str(value)


def _translated_list(text: str) -> str:
    """The overrides in ``teacher.run=[…]``."""
    try:
        overrides = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        return text
    new = [translated(override) for override in overrides]
    return text if new == overrides else f"[{','.join(json.dumps(line, ensure_ascii=False) for line in new)}]"


def refuse_renamed(overrides: Sequence[str]) -> None:
    """Refuse keys, values and class paths of version 0.1.0 on the command line.

    Raises:
        DistillError: names the override to write instead.
    """
    for override in overrides:
        if (new := translated(override)) != override:
            raise DistillError(f"{override} is now {new}")
