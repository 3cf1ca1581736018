"""Means, paired differences and their intervals over few seeds. Pure functions of numbers.

Student's t distribution is computed here. scipy, the usual library, is no dependency of distill or of what it needs,
and the closed form for whole degrees of freedom is short and exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

MOST_SEEDS = 1000
"""Number of seeds beyond which `seeds_to_decide` gives no number."""


class Interval(NamedTuple):
    """A mean and the confidence interval around it, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def central_probability(angle: float, freedom: int) -> float:
    """Probability that Student's t lies between -sqrt(freedom) tan(angle) and +sqrt(freedom) tan(angle).

    The finite series for whole degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3
    (odd) and 26.7.4 (even).

    Args:
        angle: from 0 to pi/2.
        freedom: degrees of freedom, from 1.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):  # of the cosine in the next term
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(-t < T < t) = `confidence` for Student's T with so many degrees of freedom.

    Raises:
        ValueError: `freedom` is below 1, or `confidence` not between 0 and 1.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected freedom from 1 and confidence in (0, 1), got {freedom} and {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection to the precision of a float
        middle = (low + high) / 2
        if central_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """The mean and its interval: mean ± t s / sqrt(n), with the sample standard deviation s and n - 1 degrees.

    None for fewer than two values: one value says nothing about the spread.
    """
    count = len(values)
    if count < 2:
        return None
    mean = fmean(values)
    half = student_quantile(count - 1, confidence) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def seeds_to_decide(differences: Sequence[float], confidence: float = 0.95) -> int | None:
    """Number of further seeds after which the interval of the mean difference would no longer hold 0.

    The smallest n with t(n - 1) s / sqrt(n) < |m|, less the seeds that there are, if the mean m and the standard
    deviation s of the differences stay as they are. This is a planning number: both will change with further seeds.

    Returns:
        0 if the interval excludes 0 already. None with fewer than two differences, or if more than `MOST_SEEDS` seeds
        would be needed, as for a mean of 0.
    """
    interval = mean_interval(differences, confidence)
    if interval is None:
        return None
    if interval.excludes_zero:
        return 0
    size, spread = abs(interval.mean), stdev(differences)

    def decides(count: int) -> bool:
        return student_quantile(count - 1, confidence) * spread < size * math.sqrt(count)

    if not decides(MOST_SEEDS):
        return None
    low, high = len(differences), MOST_SEEDS  # t(n - 1) / sqrt(n) falls with n, so bisection finds the smallest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high - len(differences)


def verdict(interval: Interval | None) -> str:
    """The verdict on a difference, in words: an interval that contains 0 shows no difference."""
    if interval is None:
        return "not decided"
    if not interval.excludes_zero:
        return "no difference shown"
    return "gain shown" if interval.low > 0 else "loss shown"


def share_of_gap(alone: float, distilled: float, teacher: float) -> float | None:
    """(distilled - alone) / (teacher - alone). None if the teacher is not better than the student alone."""
    return (distilled - alone) / (teacher - alone) if teacher > alone else None
