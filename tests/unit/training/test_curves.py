"""Curves: tick marks, and where lines are drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.training.curves import BACKGROUND, COLORS, SIZE, draw_curves, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4.2, [0, 1, 2, 3, 4, 5]), (0, 37, [0, 10, 20, 30, 40]), (0, 0.07, [0, 0.02, 0.04, 0.06, 0.08])],
)
def test_ticks_are_round_numbers_around_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e9])
def test_a_single_value_has_ticks(value: float) -> None:
    marks = ticks(value, value)
    assert marks[0] <= value <= marks[-1]
    assert marks[0] < marks[-1]


def test_a_line_has_a_dot_for_each_finite_point() -> None:
    points = [(1.0, 1.0), (2.0, math.nan), (3.0, 1.0)]
    picture = np.asarray(draw_curves({"losses": {"total": points, "none": []}, "empty": {"AP": []}}))
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    rows, columns = np.nonzero((picture[30:] == COLORS[0]).all(-1))
    assert np.ptp(rows) <= 7  # a level line with dots
    assert columns.min() < 70
    assert columns.max() > SIZE[0] - 25


def test_without_values_the_picture_is_empty() -> None:
    assert (np.asarray(draw_curves({})) == BACKGROUND).all()
