"""Inheritance: the student's neck and heads start with the teacher's weights, as in several papers (ICD, FGD, SSIM)."""

from __future__ import annotations

from distill.detectors.base import Detector
from distill.detectors.weights import class_rows
from distill.types import DistillError

BODY = "backbone.body."


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy the teacher's layers into the student, except the layers of the backbone's body.

    A layer is copied only if both models have all of its tensors, with equal names and shapes. If the class lists
    differ, layers that belong to classes are copied row by row, matched by exact class name.

    Returns:
        One line per part of the network: how many tensors were copied, and which were not.

    Raises:
        DistillError: the strides of the pyramids differ, so that equal names mean different levels; or no layer fits.
    """
    ours, theirs = list(student.spec.neck), list(teacher.spec.neck)
    if ours != theirs:
        raise DistillError(
            f"init=inherit: expected pyramids of equal strides, got the student's {ours} and the teacher's {theirs}. "
            "Choose a teacher of the same family, or set init=scratch"
        )
    own = {name: value for name, value in student.net.state_dict().items() if not name.startswith(BODY)}
    given = dict(teacher.net.state_dict())
    if student.classes != teacher.classes:
        remedy = "set init=scratch, or choose another teacher"
        given |= class_rows(student, given, teacher.classes, remedy)
    fits = {name: name in given and given[name].shape == value.shape for name, value in own.items()}
    apart = {_layer(name) for name, good in fits.items() if not good}
    taken = {name: given[name] for name in own if _layer(name) not in apart}
    if not taken:
        raise DistillError(
            "init=inherit: no layer of neck and heads has the same name and shapes in both models; the student's neck "
            f"has {sorted(set(student.spec.neck.values()))} channels, the teacher's "
            f"{sorted(set(teacher.spec.neck.values()))}. "
            "Set model.neck_channels and the head's sizes as the teacher has them, or set init=scratch"
        )
    student.net.load_state_dict(taken, strict=False)
    return list(_report(list(own), set(taken)))


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _report(names: list[str], taken: set[str]) -> list[str]:
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    lines = []
    for part, members in parts.items():
        left = [name for name in members if name not in taken]
        shown = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
        lines.append(
            f"inherit: {part}: {len(members) - len(left)} of {len(members)}{f'; fresh: {shown}' if left else ''}"
        )
    return lines
