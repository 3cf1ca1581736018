"""Mean, standard deviation and paired gain of the configurations of a sweep."""

from __future__ import annotations

from typing import Any

import pytest

from distill.cli.sweep_statistics import configurations, paired_gains, show_statistics, spread


def row(method: str, seed: int, ap: float, **settings: str) -> dict[str, Any]:
    return {"job": "0", "state": "done", "distill": method, "seed": str(seed), "val/AP": ap, **settings}


ROWS = [
    *(row("none", seed, ap) for seed, ap in ((0, 0.10), (1, 0.20), (2, 0.30))),
    *(row("defeat", seed, ap, **{"distill.losses.defeat.neck.foreground": "4"}) for seed, ap in ((0, 0.13), (1, 0.25))),
    row("none", 0, 0.50, model="large"),
    row("defeat", 3, 0.9, model="large"),
    row("dsig", 0, 0.4) | {"state": "failed"},
]


def test_jobs_that_differ_by_seed_are_one_configuration() -> None:
    found = configurations(ROWS)
    assert [list(one.values["val/AP"].values()) for one in found] == [[0.10, 0.20, 0.30], [0.13, 0.25], [0.5], [0.9]]


def test_gains_pair_the_seeds_of_the_student_alone() -> None:
    none, defeat, large, other_seed = found = configurations(ROWS)
    assert paired_gains(defeat, found, "val/AP") == pytest.approx([0.03, 0.05])
    assert [paired_gains(one, found, "val/AP") for one in (none, large, other_seed)] == [[], [], []]


def test_gains_over_the_baselines_of_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("defeat", seed, ap, **{"baseline": "train"}) | {"alone/val/AP": 0.1} for seed, ap in ((0, 0.3), (1, 0.5))
    ]
    (one,) = found = configurations(rows)
    assert paired_gains(one, found, "val/AP") == pytest.approx([0.2, 0.4])
    show_statistics(rows)
    assert "val/AP alone" in capsys.readouterr().out


def test_spread_is_the_sample_deviation_in_percent() -> None:
    assert (spread([0.1, 0.2, 0.3]), spread([0.03, 0.05], "+"), spread([-0.02], "+")) == (
        "20.0 ± 10.0",
        "+4.0 ± 1.4",
        "-2.0",
    )
    assert spread([]) is None


def test_the_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_statistics(ROWS[:5])
    printed = capsys.readouterr().out
    assert "20.0 ± 10.0" in printed
    assert "+4.0 ± 1.4" in printed
    show_statistics(ROWS[:1])
    assert capsys.readouterr().out == ""
