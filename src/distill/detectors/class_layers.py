"""The layers whose output rows belong to classes, and the selection of rows by class name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.detectors.base import Detector
from distill.detectors.state_dicts import State
from distill.labels import match_classes


def class_rows(detector: Detector, state: State, classes: Sequence[str], remedy: str) -> dict[str, Tensor]:
    """Select the rows of the detector's classes, in the detector's order, from every layer that belongs to classes.

    Args:
        detector: the detector that will load the rows.
        state: a state dict that was made for `classes`.
        classes: class names in label order.
        remedy: the end of the message if a class is missing.

    Returns:
        Name of a weight or bias -> its selected rows.

    Raises:
        DistillError: a class of the detector is not in `classes`.
    """
    chosen, taken = torch.tensor(match_classes(detector.classes, classes, remedy)), {}
    for layer, rows in detector.class_layers.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in state or len(state[name]) % ((len(classes) + 1) * rows):
                continue  # `fit` reports the error
            split = state[name].reshape(-1, len(classes) + 1, rows, *state[name].shape[1:])
            taken[name] = split[:, chosen].flatten(0, 2)
    return taken
