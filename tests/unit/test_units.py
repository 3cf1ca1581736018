"""Numbers as texts."""

from __future__ import annotations

import pytest

from distill.units import duration, percent


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_metrics_are_percent_with_one_decimal_and_missing_ones_are_a_dash() -> None:
    assert [percent(value) for value in (0.0, 0.12345, 1.0, -1.0)] == ["0.0", "12.3", "100.0", "–"]
