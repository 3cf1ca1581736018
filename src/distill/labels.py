"""Maps between the class lists of two models, or of a model and a data set. Classes match by exact name only."""

from __future__ import annotations

from collections.abc import Sequence

from distill.types import DistillError


def match_classes(wanted: Sequence[str], known: Sequence[str], remedy: str) -> list[int]:
    """Return, for the background and each class of ``wanted``, its label in ``known``.

    ``teacher_logits[:, match_classes(student_classes, teacher_classes, …)]`` has the student's K+1 columns.

    Args:
        wanted: K class names; class ``i`` has label ``i + 1``.
        known: class names to look them up in, in the order of their labels.
        remedy: end of the error message: what the user can do besides renaming classes.

    Returns:
        K+1 labels. The first one is 0, the background.

    Raises:
        DistillError: a class of ``wanted`` is missing in ``known``.
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        named = [name for name in known if name != "N/A"]  # fills the unused labels of torchvision's COCO weights
        raise DistillError(
            f"class lists are matched by exact name, but {missing} of {list(wanted)} is not among {named}. "
            f"Rename the classes to match, {remedy}"
        )
    return [0, *(list(known).index(name) + 1 for name in wanted)]


def unknown_classes(model: Sequence[str], data: Sequence[str]) -> list[str]:
    """Return the classes of the data that a model does not know, in the order of their labels."""
    return [name for name in data if name not in model]


def shared_labels(model: Sequence[str], data: Sequence[str]) -> list[int]:
    """Return, for the background and each class of a model, its label in the data; 0 where the data lacks the class.

    Args:
        model: the model's K class names; class ``i`` has label ``i + 1``.
        data: the data's class names, in the order of their labels.

    Returns:
        K+1 labels. The first one is 0, the background.

    Raises:
        DistillError: model and data share no class name.
    """
    labels = [list(data).index(name) + 1 if name in data else 0 for name in model]
    if not any(labels):
        raise DistillError(
            f"the model's classes {list(model)[:10]} and the data's {list(data)[:10]} share no name, so AP cannot be "
            "measured. Class lists are matched by exact name: rename the classes, or choose other data"
        )
    return [0, *labels]
