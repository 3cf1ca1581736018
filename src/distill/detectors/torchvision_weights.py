"""The published weights of torchvision: entries of its enums, their class names, and the download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision

from distill.detectors.state_dicts import State
from distill.types import DistillError


def find_entry(source: str, enum: Any) -> Any:
    """torchvision's entry with the name `source`, or None if torchvision has no such entry."""
    if source in enum.__members__:
        return enum[source]
    try:
        return torchvision.models.get_weight(source)
    except (ValueError, KeyError):
        return None


def categories(entry: Any) -> tuple[str, ...]:
    """Class names of torchvision's weights, without the first category, which is the background."""
    return tuple(entry.meta["categories"][1:])


def download(entry: Any, option: str) -> State:
    """Download torchvision's weights, or read them from torch's cache.

    Args:
        entry: a member of torchvision's enum.
        option: the option with which the user chose the entry, for the message.

    Raises:
        DistillError: the weights cannot be fetched. The message says how to provide them without a network.
    """
    try:
        state: State = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or a broken download
        name = Path(entry.url).name
        raise DistillError(
            f"{option}: {entry} could not be fetched ({error}). Get {entry.url} on a machine with a network and set"
            f" {option}=/path/to/{name} (of the student: model.{option}), or put it into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    return state
