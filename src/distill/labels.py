"""Class lists meet here: by exact name, and in no other way."""

from __future__ import annotations

from collections.abc import Sequence

from distill.types import DistillError


def match_classes(wanted: Sequence[str], known: Sequence[str], remedy: str) -> list[int]:
    """For each label of ``wanted``, background (0) first, the label of the same name in ``known``.

    So ``teacher_logits[:, match_classes(student, teacher, …)]`` has the student's K+1 columns.

    Raises:
        DistillError: a wanted class is not known; ends with the remedy.
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        raise DistillError(
            f"class lists are matched by exact name, but {missing} of {list(wanted)} is not among {list(known)}. "
            f"Rename the classes to match, {remedy}"
        )
    return [0, *(list(known).index(name) + 1 for name in wanted)]


def shared_labels(model: Sequence[str], data: Sequence[str]) -> list[int]:
    """For each label of a model, background first, the data's label of the same name, 0 where the data has none.

    Raises:
        DistillError: no name is shared.
    """
    labels = [list(data).index(name) + 1 if name in data else 0 for name in model]
    if not any(labels):
        raise DistillError(
            f"the model's classes {list(model)[:10]} and the data's {list(data)[:10]} share no name, so its AP cannot be "
            "measured here; class lists are matched by exact name"
        )
    return [0, *labels]
