"""Maps between the class lists of two models, or of a model and a data set.

Classes match by exact name. Only a bridge between a teacher and other data (``classes.map``) knows more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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


AUTO = "auto"
"""Value of ``classes.map`` that matches names by `SAME` and by spelling alone."""

SAME: tuple[tuple[str, ...], ...] = (
    ("airplane", "aeroplane", "plane"),
    ("bicycle", "bike"),
    ("car", "automobile"),
    ("cell phone", "mobile phone"),
    ("couch", "sofa"),
    ("cow", "cattle"),
    ("donut", "doughnut"),
    ("dining table", "table"),
    ("hair drier", "hair dryer"),
    ("motorcycle", "motorbike"),
    ("person", "pedestrian", "people", "human"),
    ("potted plant", "pottedplant"),
    ("tv", "tv monitor", "television"),
)
"""Names of one class in different data sets: COCO, Pascal VOC, Objects365, Open Images and others."""


def bridge_classes(
    teacher: Sequence[str], data: Sequence[str], given: Mapping[str, str | None] | str
) -> dict[str, str]:
    """Return the data's class name of each class of a teacher that has one. Several may have the same.

    The given pairs come first. Classes without a pair match by name, without regard to case, spaces, hyphens and
    underscores, or by the table `SAME`.

    Args:
        teacher: class names of the teacher.
        data: class names of the data.
        given: teacher's name -> data's name; None: no class. Or ``auto``, which gives no pairs.

    Raises:
        DistillError: a pair has an unknown name, or no class has a partner.
    """
    pairs: Mapping[str, str | None] = {} if isinstance(given, str) else given
    if isinstance(given, str) and given != AUTO:
        raise DistillError(
            f"classes.map={given}: expected auto, or pairs as in 'classes.map={{car:vehicle,truck:vehicle}}', in "
            "quotes, because a shell expands braces"
        )
    for names, known, whose in ((pairs.keys(), teacher, "teacher"), (pairs.values(), data, "data")):
        if wrong := [name for name in names if name is not None and name not in known]:
            raise DistillError(
                f"classes.map: {wrong} is no class of the {whose}; its classes are {[n for n in known if n != 'N/A']}. "
                "Each pair is TEACHER:DATA"
            )
    by_spelling = {_plain(name): name for name in reversed(data)}
    bridge = {}
    for name in teacher:
        partner = pairs[name] if name in pairs else by_spelling.get(_plain(name))
        if partner is not None and name != "N/A":
            bridge[name] = partner
    if not bridge:
        raise DistillError(
            f"classes.map: none of the teacher's classes {[name for name in teacher if name != 'N/A'][:10]} has a "
            f"partner among {list(data)[:10]}. Name pairs, as in 'classes.map={{{teacher[0]}:{data[0]}}}'; or choose a "
            "method that compares features alone, which needs no map: distill=ssim"
        )
    return bridge


def describe_bridge(bridge: Mapping[str, str], data: Sequence[str]) -> list[str]:
    """Return a line for each class of the data: the teacher's classes that stand for it, or that none does."""
    lines = []
    for name in data:
        partners = [own for own, partner in bridge.items() if partner == name]
        lines.append(
            f"{name}: {' + '.join(partners) if partners else 'unknown to the teacher; terms on features only'}"
        )
    return lines


def _plain(name: str) -> str:
    """The first name of a class in `SAME`, in a form that does not depend on spelling."""
    spelled = re.sub(r"[\s_-]+", "", name).casefold()
    for names in SAME:
        if spelled in (re.sub(r"\s", "", other) for other in names):
            return re.sub(r"\s", "", names[0])
    return spelled
