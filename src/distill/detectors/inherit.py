"""Inheritance: the student's neck and heads start with the teacher's weights, as in several papers (ICD, FGD, SSIM)."""

from __future__ import annotations

from torch import Tensor

from distill.detectors.base import Detector
from distill.detectors.class_layers import class_rows
from distill.types import DistillError


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy the teacher's layers into the student, except the layers of the backbone's body.

    A layer is copied only if both models have all of its tensors, with equal names and shapes. If the class lists
    differ, layers that belong to classes are copied row by row, matched by exact class name.

    Returns:
        One line per part of the network: how many tensors were copied, and which were not.

    Raises:
        DistillError: see `inherited_tensors`.
    """
    copied = inherited_tensors(student, teacher)
    student.net.load_state_dict(copied, strict=False)
    names = [name for name in student.net.state_dict() if not name.startswith(f"{student.body_path}.")]
    return _report(names, set(copied))


def inherited_tensors(student: Detector, teacher: Detector) -> dict[str, Tensor]:
    """Return the tensors of the teacher that the student takes over, by name. The teacher may be on the device meta.

    Raises:
        DistillError: the strides of the pyramids differ, so that equal names mean different levels; or no layer fits.
    """
    student_strides, teacher_strides = list(student.spec.neck), list(teacher.spec.neck)
    if student_strides != teacher_strides:
        raise DistillError(
            f"init=inherit: expected pyramids of equal strides, got the student's {student_strides} and the "
            f"teacher's {teacher_strides}. Choose a teacher of the same family and input_stride, or set init=scratch"
        )
    body = f"{student.body_path}."
    student_state = {name: value for name, value in student.net.state_dict().items() if not name.startswith(body)}
    teacher_state = dict(teacher.net.state_dict())
    if student.classes != teacher.classes:
        remedy = "set init=scratch, or choose another teacher"
        teacher_state |= class_rows(student, teacher_state, teacher.classes, remedy)
    different_layers = {
        _layer(name)
        for name, value in student_state.items()
        if name not in teacher_state or teacher_state[name].shape != value.shape
    }
    copied = {name: teacher_state[name] for name in student_state if _layer(name) not in different_layers}
    if not copied:
        raise DistillError(
            "init=inherit: no layer of neck and heads has the same name and shapes in both models; the student's neck "
            f"has {sorted(set(student.spec.neck.values()))} channels, the teacher's "
            f"{sorted(set(teacher.spec.neck.values()))}. "
            "Set model.neck_channels and the head's sizes as the teacher has them, or set init=scratch"
        )
    return copied


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _report(names: list[str], copied: set[str]) -> list[str]:
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    lines = []
    for part, members in parts.items():
        fresh = [name for name in members if name not in copied]
        examples = ", ".join(fresh[:4]) + (", ..." if len(fresh) > 4 else "")
        lines.append(
            f"inherit: {part}: {len(members) - len(fresh)} of {len(members)}{f'; fresh: {examples}' if fresh else ''}"
        )
    return lines
