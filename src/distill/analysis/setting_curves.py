"""The metric of a comparison over the value of one setting, such as a loss weight (figure 4 of DeFeat)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress

from distill.analysis.charts import Lines
from distill.analysis.comparison import Comparison

LEAST_VALUES = 3
"""Fewest values of a setting that make a line."""

Others = frozenset[tuple[str, str]]
"""The other settings of a configuration, as (key, value as JSON)."""


def setting_curves(comparison: Comparison) -> dict[str, Lines]:
    """Lines through the distilled configurations that differ in the value of one number only.

    Returns:
        Key -> name of a line -> the values of the key in ascending order, and the means of the main metric over the
        seeds, in percent. The name of a line has the other settings in which the lines of a key differ.
    """
    curves: dict[str, Lines] = {}
    for key, cells in comparison.settings.items():
        groups: dict[Others, list[tuple[float, float]]] = {}
        for row in comparison.rows:
            value = _number(cells.get(row.configuration))
            if row.role == "distilled" and value is not None and comparison.metric in row.values:
                others = _other_settings(comparison.settings, key, row.configuration)
                groups.setdefault(others, []).append((value, 100 * row.values[comparison.metric]))
        lines = {others: sorted(points) for others, points in groups.items() if len(points) >= LEAST_VALUES}
        if lines:
            shared = frozenset.intersection(*lines)
            curves[key] = {
                _name(others - shared, key): ([x for x, _ in points], [y for _, y in points])
                for others, points in lines.items()
            }
    return curves


def _number(value: str | None) -> float | None:
    """A value in JSON as a number; None if it is missing or something else."""
    with suppress(TypeError, ValueError):
        number = json.loads(value or "null")
        return None if isinstance(number, bool) else float(number)
    return None


def _other_settings(settings: Mapping[str, Mapping[str, str]], key: str, configuration: str) -> Others:
    return frozenset(
        (other, cells[configuration]) for other, cells in settings.items() if other != key and configuration in cells
    )


def _name(settings: Others, key: str) -> str:
    """The settings of a line with the last two parts of their keys. The only line has the name of its key."""
    parts = sorted(f"{_short(other)}={value.strip(chr(34))}" for other, value in settings)
    return ", ".join(parts) or _short(key)


def _short(key: str) -> str:
    return ".".join(key.split(".")[-2:])
