"""Numbers as texts for people: metrics in percent, durations, times of day. Files and keys keep plain numbers."""

from __future__ import annotations

import time

MISSING = "–"
"""Text for a value that does not exist."""


def percent(value: float) -> str:
    """A metric from 0 to 1 in percent with one decimal.

    `MISSING` for -1, which metrics return where there is no ground truth of this kind.
    """
    return f"{100 * value:.1f}" if value >= 0 else MISSING


def duration(seconds: float) -> str:
    """A duration: ``9.4 s``, ``3 min 5 s`` or ``2 h 7 min``."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def time_of_day(seconds_from_now: float) -> str:
    """The time of day in so many seconds, with the date if it is another day."""
    now, then = time.time(), time.time() + seconds_from_now
    same = time.localtime(now)[:3] == time.localtime(then)[:3]
    return time.strftime("%H:%M" if same else "%Y-%m-%d %H:%M", time.localtime(then))
