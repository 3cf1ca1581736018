"""The description of a detector in `student.json` and in checkpoints, and the conversion of older formats.

A description is ``{"format": 2, "model": {"family": ..., option: value, ...}, "extra": {...}}``. This module does not
import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.types import DistillError

FORMAT = 2
"""The format that this version writes. Version 0.1.0 wrote format 1."""

RENAMED_OPTIONS = {
    "backbone": "backbone.name",
    **{
        name: f"backbone.{name}" for name in ("depth", "width", "norm", "norm_eps", "stride_in_1x1", "trainable_stages")
    },
    "backbone_weights": "backbone.weights",
    **{f"anchor_{name}": f"anchors.{name}" for name in ("sizes", "ratios", "offset", "rounded", "order", "step")},
    **{name: f"pixels.{name}" for name in ("channel_order", "mean", "std")},
}
"""Option of a detector in format 1 -> its dotted path in the current format."""

RENAMED_VALUES: dict[str, dict[str, str]] = {"backbone.norm": {"live": "batch", "fixed": "batch_fixed_stats"}}
"""Dotted path of an option -> value in format 1 -> value in the current format."""


def renamed_option(name: str, value: Any) -> tuple[str, Any]:
    """Return the current dotted path and value of an option in format 1. An unchanged option is returned as given."""
    path = RENAMED_OPTIONS.get(name, name)
    new_value = RENAMED_VALUES.get(path, {}).get(value, value) if isinstance(value, str) else value
    return path, new_value


def to_current_format(description: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert a description of any format to the current format.

    Args:
        description: the content of `student.json`, or its part in a checkpoint.
        where: the file, for messages.

    Raises:
        DistillError: the format is unknown, for example because a newer version of distill wrote the description.
    """
    written = description.get("format", 1)
    if isinstance(written, bool) or written not in range(1, FORMAT + 1):
        raise DistillError(
            f"{where}: the detector's description has format {written!r}, and this version of distill reads formats 1 "
            f"to {FORMAT}: install the version that wrote it, or a newer one"
        )
    model = description.get("model")
    if written == FORMAT or not isinstance(model, Mapping):
        return dict(description)
    converted: dict[str, Any] = {}
    for name, value in model.items():
        path, new_value = (name, value) if isinstance(value, Mapping) else renamed_option(name, value)
        *parents, leaf = path.split(".")
        node = converted
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = new_value
    return {**description, "format": FORMAT, "model": converted}


def checkpoint_model(checkpoint: Mapping[str, Any], where: str) -> Any:
    """Return the student's model from a checkpoint of any format, in the current format.

    The result is None if the checkpoint has no description.
    """
    description = {"format": checkpoint.get("student_format", 1), "model": checkpoint.get("student")}
    return to_current_format(description, where)["model"]
