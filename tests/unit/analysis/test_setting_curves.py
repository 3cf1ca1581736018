"""Lines of AP over one setting, on comparisons made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.analysis.comparison import Comparison, Row
from distill.analysis.setting_curves import setting_curves
from distill.cli.reports.comparison_report import write_page

WEIGHT = "distill.losses.defeat.neck.foreground"
OTHER = "distill.losses.defeat.neck.background"


def comparison(configurations: dict[str, tuple[float, dict[str, Any]]]) -> Comparison:
    """Name of a distilled configuration -> its AP and its settings that differ; and a student alone."""
    rows = [Row("none", "student alone", [0], {"test/AP": 0.1}, None, None, None)]
    rows += [Row(name, "distilled", [0], {"test/AP": ap}, None, None, None) for name, (ap, _) in configurations.items()]
    settings: dict[str, dict[str, str]] = {}
    for name, (_, values) in configurations.items():
        for key, value in values.items():
            settings.setdefault(key, {})[name] = json.dumps(value)
    return Comparison("test", "test/AP", "epochs", rows, [], [], settings, [])


def test_two_lines_over_a_weight() -> None:
    curves = setting_curves(
        comparison(
            {
                "a": (0.30, {WEIGHT: 4, OTHER: 0}),
                "b": (0.20, {WEIGHT: 1, OTHER: 0}),
                "c": (0.25, {WEIGHT: 16.0, OTHER: 0}),
                "d": (0.40, {WEIGHT: 1, OTHER: 8}),
                "e": (0.41, {WEIGHT: 4, OTHER: 8}),
                "f": (0.42, {WEIGHT: 16, OTHER: 8}),
            }
        )
    )
    assert list(curves) == [WEIGHT]
    first, second = curves[WEIGHT]["neck.background=0"], curves[WEIGHT]["neck.background=8"]
    assert first == ([1, 4, 16], [20, 30, 25])
    assert second[0] == [1, 4, 16]


def test_the_only_line_has_the_name_of_its_key() -> None:
    weights = {str(weight): (weight / 100, {WEIGHT: weight}) for weight in (8, 2, 4)}
    assert setting_curves(comparison(weights)) == {WEIGHT: {"neck.foreground": ([2, 4, 8], [2, 4, 8])}}


def test_two_values_words_and_switches_make_no_line() -> None:
    assert setting_curves(comparison({str(w): (0.1, {WEIGHT: w}) for w in (1, 2)})) == {}
    assert setting_curves(comparison({w: (0.1, {"distill.mask.kind": w}) for w in "abc"})) == {}
    assert setting_curves(comparison({str(w): (0.1, {"distill.on": w}) for w in (True, False, None)})) == {}


def test_configurations_that_differ_in_two_settings_are_not_joined() -> None:
    mixed = {str(w): (0.1, {WEIGHT: w, OTHER: w}) for w in (1, 2, 4)}
    assert setting_curves(comparison(mixed)) == {}


def test_the_page_of_a_comparison_has_the_plot(tmp_path: Path) -> None:
    weights = {str(weight): (weight / 100, {WEIGHT: weight}) for weight in (8, 2, 4)}
    page = write_page(comparison(weights), tmp_path / "comparison.html").read_text()
    assert (tmp_path / "comparison_settings.png").stat().st_size > 1000
    assert "The metric over one setting" in page
    assert "The metric over one setting" not in write_page(comparison({}), tmp_path / "other.html").read_text()
