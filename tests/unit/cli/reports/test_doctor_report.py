"""What doctor says about the teacher and the student alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.cli.reports.doctor_report import examine_gap
from distill.cli.runs.baseline import Baseline
from distill.cli.runs.shared_run import SharedRun
from helpers.finished_runs import write_run


@pytest.mark.parametrize(("trained", "notes"), [(True, ["the teacher has 30.0, the student alone"]), (False, [])])
def test_the_teacher_is_compared_with_the_baseline_of_the_run(trained: bool, notes: list[str], tmp_path: Path) -> None:
    """No other run is looked for. A baseline that is not trained yet has a note of its own."""
    teacher: Any = SimpleNamespace(source="teachers/x")
    unused: Any = None
    folder = write_run(tmp_path / "alone", 0.2) if trained else tmp_path / "alone"
    baseline = Baseline(SharedRun("baseline", folder), {})
    report: dict[str, Any] = {"teacher": {"here": 0.3}, "notes": []}
    examine_gap(unused, unused, unused, teacher, baseline, report)
    assert len(report["notes"]) == len(notes)
    for said, expected in zip(report["notes"], notes, strict=True):
        assert said.startswith(expected)
