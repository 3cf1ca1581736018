"""Intervals over seeds: textbook values of Student's t, a worked example, and the number of seeds that decides."""

from __future__ import annotations

import math
from statistics import stdev

import pytest

from distill.analysis.statistics import (
    Interval,
    mean_interval,
    seeds_to_decide,
    share_of_gap,
    student_quantile,
    verdict,
)

# Two-sided critical values, as printed in every textbook's table (for example NIST/SEMATECH e-Handbook, 1.3.6.7.2).
TABLE = {
    0.95: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 60: 2.000, 100: 1.984},
    0.99: {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 10: 3.169, 29: 2.756},
    0.90: {1: 6.314, 2: 2.920, 7: 1.895, 20: 1.725},
}


@pytest.mark.parametrize(
    ("confidence", "freedom", "value"),
    [(confidence, freedom, value) for confidence, row in TABLE.items() for freedom, value in row.items()],
)
def test_quantiles_are_those_of_the_printed_table(confidence: float, freedom: int, value: float) -> None:
    assert student_quantile(freedom, confidence) == pytest.approx(value, abs=5e-4)


def test_quantiles_approach_the_normal_distribution() -> None:
    assert student_quantile(1000) == pytest.approx(1.9623, abs=1e-4)


@pytest.mark.parametrize(("freedom", "confidence"), [(0, 0.95), (3, 1.0), (3, 0.0)])
def test_impossible_arguments_are_refused(freedom: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="freedom from 1"):
        student_quantile(freedom, confidence)


def test_the_interval_of_a_worked_example() -> None:
    """Mean 3, s = 1, n = 3, t = 4.303: half a width of 4.303 / sqrt(3) = 2.484."""
    assert mean_interval([2.0, 3.0, 4.0]) == pytest.approx((3.0, 3 - 2.484, 3 + 2.484), abs=1e-3)
    assert mean_interval([2.0]) is None
    assert mean_interval([]) is None
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("differences", [[1.0, 3.0], [0.5, -0.2, 0.9], [-1.0, -3.0, 0.5, 0.1], [2.0, 0.1, 0.9, -0.4]])
def test_so_many_further_seeds_decide_and_one_fewer_does_not(differences: list[float]) -> None:
    """A search without bisection, with the mean and the spread of the seeds so far."""
    size, spread, count = abs(sum(differences) / len(differences)), stdev(differences), len(differences)
    needed = next(n for n in range(count, 2000) if student_quantile(n - 1) * spread / math.sqrt(n) < size)
    assert seeds_to_decide(differences) == needed - count > 0


def test_seeds_that_decide_already_or_never() -> None:
    assert seeds_to_decide([1.0, 1.1, 0.9]) == 0
    assert seeds_to_decide([1.0, -1.0]) is None
    assert seeds_to_decide([1.0, -0.999]) is None
    assert seeds_to_decide([1.0]) is None


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(1.0, 0.1, 1.9), "gain shown"),
        (Interval(-1.0, -1.9, -0.1), "loss shown"),
        (Interval(1.0, -0.1, 2.1), "no difference shown"),
        (Interval(0.0, 0.0, 0.0), "no difference shown"),
        (None, "not decided"),
    ],
)
def test_verdicts(interval: Interval | None, words: str) -> None:
    assert verdict(interval) == words


def test_the_share_of_the_gap() -> None:
    assert share_of_gap(0.2, 0.3, 0.4) == pytest.approx(0.5)
    assert share_of_gap(0.4, 0.5, 0.4) is None
