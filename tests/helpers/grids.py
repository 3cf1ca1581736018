"""Large grids of parameters: a few are tested daily, all of them by ``make test-all``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_exhaustive(values: Iterable[Any], daily: Iterable[Any] | Callable[[Any], bool]) -> list[Any]:
    """Parameters. Those in `daily`, or for which it is true, run in ``make test``, the others in ``make test-all``.

    `daily` must name values of the grid, so that a renamed one is noticed.
    """
    values = list(values)
    chosen = [value for value in values if daily(value)] if callable(daily) else list(daily)
    assert chosen
    assert all(value in values for value in chosen), [value for value in chosen if value not in values]
    return [value if value in chosen else exhaustive(value) for value in values]


def exhaustive(value: Any) -> Any:
    """A parameter, or several in a tuple, that ``make test-all`` tests."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)
