"""Texts of a run's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.analysis.run_page import baseline_results, to_do_text


def test_the_number_of_images_is_not_that_of_the_first_ones() -> None:
    (text,) = to_do_text({"to_do": [{}] * 100, "to_do_images": 250})
    assert "to_do.csv lists all 250" in text
    assert to_do_text({"to_do": [], "to_do_images": 0}) == []


def test_the_analyzed_baseline_stands_in_the_table_of_results_on_the_same_images(tmp_path: Path) -> None:
    results = {"val/AP": 0.4, "test/AP": 0.3}
    other: dict[str, Any] = {"student": results, "measured": {"data": {"val": "a", "test": "b"}}}
    (tmp_path / "summary.json").write_text(json.dumps(other))
    report = {"models": {"baseline": str(tmp_path), "student": "run"}}
    summary = {"student": {"val/AP": 0.5, "test/AP": 0.5}, "measured": {"data": {"val": "a", "test": "c"}}}
    assert baseline_results(summary, report) == {"val/AP": 0.4}
    assert baseline_results({**summary, "baseline": {"values": {"val/AP": 0.1}}}, report) == {"val/AP": 0.1}
    assert baseline_results(summary, {}) == {}
    assert baseline_results(summary, {"models": {"baseline": str(tmp_path / "gone")}}) == {}
