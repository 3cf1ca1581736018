"""Mean and standard deviation of a sweep's configurations over seeds, and their gain over the student alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from distill.cli.tables import print_table

METRICS = ("val/AP", "val/mAP", "test/AP", "test/mAP")
ALONE = "alone/"
"""Prefix of the columns with the results of a job's baseline, for ``baseline=train`` and ``baseline=RUN``."""
NOT_SETTINGS = ("job", "state", "error", "seed")


@dataclass
class Configuration:
    """The jobs of a sweep that differ by their seed only."""

    settings: Mapping[str, str]
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metric -> seed -> value, from 0 to 1."""


def configurations(rows: Sequence[Mapping[str, Any]]) -> list[Configuration]:
    """The configurations of the finished jobs, in the order of the rows of ``sweep.csv``."""
    grouped: dict[tuple[tuple[str, str], ...], Configuration] = {}
    for row in rows:
        if row["state"] != "done":
            continue
        settings = {name: str(row[name]) for name in row if "/" not in name and name not in NOT_SETTINGS}
        one = grouped.setdefault(tuple(sorted(settings.items())), Configuration(settings))
        for name in (*METRICS, *(f"{ALONE}{metric}" for metric in METRICS)):
            if name in row:
                one.values.setdefault(name, {})[str(row.get("seed", ""))] = float(row[name])
    return list(grouped.values())


def paired_gains(one: Configuration, others: Sequence[Configuration], metric: str) -> list[float]:
    """Differences to ``distill=none`` with the same seed and the same other settings, or to the jobs' baselines.

    Empty without such jobs and without baselines.
    """
    wanted = _without_method(one.settings)
    for other in others:
        if other is not one and other.settings.get("distill") == "none" and _without_method(other.settings) == wanted:
            ours, alone = one.values.get(metric, {}), other.values.get(metric, {})
            return [ours[seed] - alone[seed] for seed in ours if seed in alone]
    ours, alone = one.values.get(metric, {}), one.values.get(f"{ALONE}{metric}", {})
    return [ours[seed] - alone[seed] for seed in ours if seed in alone]


def _without_method(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings that decide about the student alone."""
    return {
        name: value
        for name, value in settings.items()
        if name.split(".")[0] not in ("distill", "teacher") and name != "init"
    }


def spread(values: Sequence[float], sign: str = "") -> str | None:
    """Mean ± standard deviation in percent; the value alone if there is one; None without values."""
    if not values:
        return None
    text = f"{100 * mean(values):{sign}.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def show_statistics(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each configuration, if there are several seeds or a student alone to compare with."""
    found = configurations(rows)
    metrics = [name for name in METRICS if any(name in one.values for one in found)]
    gains = {name: [paired_gains(one, found, name) for one in found] for name in metrics}
    several = any(len(values) > 1 for one in found for values in one.values.values())
    if not several and not any(any(each) for each in gains.values()):
        return
    alone = [name for name in metrics if any(f"{ALONE}{name}" in one.values for one in found)]
    names = dict.fromkeys(name for one in found for name in one.settings)
    varied = [name for name in names if len({one.settings.get(name) for one in found}) > 1]
    cells = [
        [
            *(one.settings.get(name) for name in varied),
            max(map(len, one.values.values()), default=0),
            *(spread(list(one.values.get(f"{ALONE}{name}", {}).values())) for name in alone),
            *(
                text
                for name in metrics
                for text in (spread(list(one.values.get(name, {}).values())), spread(gains[name][number], "+"))
            ),
        ]
        for number, one in enumerate(found)
    ]
    columns = [
        *varied,
        "seeds",
        *(f"{name} alone" for name in alone),
        *(text for name in metrics for text in (name, "gain")),
    ]
    print_table(
        "mean ± standard deviation over seeds, percent; gain over the student alone with the same seeds",
        columns,
        cells,
        len(varied),
    )
