"""Agreement of student and teacher, and the to-do list, on a case counted by hand."""

from __future__ import annotations

import pytest

from distill.analysis.agreement import Agreement, ToDo, agreement, to_do_list
from helpers.detection_cases import arrays

CLASSES = ("cat", "dog")
A, B, C, D = (0, 0, 10, 10), (50, 0, 60, 10), (0, 50, 10, 60), (90, 90, 99, 99)
OBJECTS = [(1, 1, A), (1, 2, B), (2, 1, A), (3, 1, A), (3, 1, C)]
TEACHER = [
    *((1, 1, A, 0.9), (1, 2, B, 0.9)),  # both objects
    *((2, 1, A, 0.9), (2, 2, D, 0.9)),  # the object, and a false positive
    *((3, 1, D, 0.9),),  # a false positive; both objects are missed
]
STUDENT = [
    *((1, 1, A, 0.8), (1, 1, B, 0.8)),  # one object; the other as another class, which the teacher does not claim
    *((2, 2, D, 0.8), (2, 2, C, 0.8)),  # the teacher's false positive, and one of its own
    *((3, 1, A, 0.8),),  # an object that the teacher misses
]


def test_agreement() -> None:
    truth, teacher = arrays(CLASSES, [1, 2, 3], OBJECTS, TEACHER)
    student = arrays(CLASSES, [1, 2, 3], OBJECTS, STUDENT)[1]
    assert agreement(truth, teacher, student) == pytest.approx(
        Agreement(boxes=5, found=2 / 5, right_found=1 / 3, mistakes=2, copied=1 / 2, missed=2, missed_too=1 / 2)
    )
    same = agreement(truth, teacher, teacher)
    assert (same.found, same.right_found, same.copied, same.missed_too) == (1, 1, 1, 1)
    nothing = arrays(CLASSES, [1, 2, 3], OBJECTS, [])[1]
    assert agreement(truth, nothing, student)[:5] == (0, -1, -1, 0, -1)


def test_to_do_list() -> None:
    truth, teacher = arrays(CLASSES, [1, 2, 3], OBJECTS, TEACHER)
    student = arrays(CLASSES, [1, 2, 3], OBJECTS, STUDENT)[1]
    assert to_do_list(truth, teacher, student) == [
        ToDo(image=1, lost=1, invented=1, gained=0),
        ToDo(image=2, lost=1, invented=1, gained=0),
    ]
    assert to_do_list(truth, teacher, student)[0].errors == 2
    assert to_do_list(truth, student, teacher) == [
        ToDo(image=3, lost=1, invented=1, gained=0),
    ]
    assert to_do_list(truth, teacher, teacher) == []
