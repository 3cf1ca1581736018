"""The layers whose output rows belong to classes, and the selection of rows by class name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill.detectors.base import Detector
from distill.detectors.state_dicts import State
from distill.labels import match_classes
from distill.types import DistillError


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
    return _select_rows(detector, state, len(classes), match_classes(detector.classes, classes, remedy))


def known_class_rows(detector: Detector, state: State, classes: Sequence[str]) -> dict[str, Tensor]:
    """Select the rows as `class_rows` does. A class that is not in `classes` keeps the detector's current rows.

    Raises:
        DistillError: the detector and `classes` share no class.
    """
    labels = [0, *(list(classes).index(name) + 1 if name in classes else 0 for name in detector.classes)]
    if not any(labels):
        raise DistillError(
            f"head=match: the detector's classes {list(detector.classes)[:10]} and those of the weights, "
            f"{list(classes)[:10]}, share no name. Class lists are matched by exact name: rename the classes, or set "
            "head=new"
        )
    return _select_rows(detector, state, len(classes), labels)


def count_outputs(detector: Detector, state: State) -> int | None:
    """Return the number of classes of a state dict, with background; None if the layers do not agree on a number."""
    counts = set()
    for layer in detector.class_layers:
        rows_per_class = len(detector.net.get_submodule(layer).weight) // (len(detector.classes) + 1)
        rows = len(state.get(f"{layer}.weight", ()))
        counts.add(rows // rows_per_class if rows and rows % rows_per_class == 0 else None)
    return counts.pop() if len(counts) == 1 else None


def _select_rows(detector: Detector, state: State, classes: int, labels: Sequence[int]) -> dict[str, Tensor]:
    """Select the rows of `labels`, which holds, for each label of the detector, its label among the state's `classes`.

    Label 0 is the background. For a class, label 0 means that the state does not know it.
    """
    current = detector.net.state_dict()
    selected = {}
    for layer, rows in detector.class_layers.items():
        before, behind = detector.rows_around(layer)
        groups = before + classes + behind
        unknown = [before + index for index, known in enumerate(labels[1:]) if not known]
        of_classes = [max(0, before + known - 1) for known in labels[1:]]
        chosen = [*range(before), *of_classes, *range(before + classes, groups)]
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in state or len(state[name]) % (groups * rows):
                continue  # `fit` reports the error
            values = state[name].reshape(-1, groups, rows, *state[name].shape[1:])[:, chosen]
            if values.flatten(0, 2).shape == current[name].shape:
                values[:, unknown] = current[name].reshape(values.shape)[:, unknown].to(values.dtype)
            selected[name] = values.flatten(0, 2)
    return selected
