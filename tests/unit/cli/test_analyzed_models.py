"""Which baseline an analysis finds, and whether two runs were measured on the same images."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli import analyzed_models
from distill.cli.analyzed_models import Models, find_baseline, same_split
from distill.cli.override_checks import compose_without_run
from distill.cli.preflight import plan_run
from helpers.finished_runs import write_run
from helpers.runs import TINY_DATA


def test_the_baseline_that_the_run_names_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training was longer, so its recipe is another one. Without its files the advice remains."""
    monkeypatch.setattr(analyzed_models, "load_student", lambda folder: f"student of {folder.name}")
    plan = plan_run(compose_without_run([*TINY_DATA, f"paths.outputs={tmp_path}"]))
    alone = write_run(tmp_path / "baselines" / "longer", 0.2)
    summary = {"losses": ["defeat"], "recipe": "x", "baseline": {"source": str(alone), "values": {}}}
    models = Models()
    find_baseline(models, plan, summary)
    assert (models.detectors, models.sources) == ({"baseline": "student of longer"}, {"baseline": str(alone)})
    assert not models.notes
    (alone / "student.pt").unlink()
    models = Models()
    find_baseline(models, plan, summary)
    assert not models.detectors
    assert "distill=none" in models.notes[0]


def test_whether_a_split_is_the_same() -> None:
    summary = {"measured": {"data": {"val": "a"}}}
    assert same_split(summary, "val", "a") is True
    assert same_split(summary, "val", "b") is False
    assert same_split(summary, "test", "a") is None
    assert same_split({}, "val", "a") is None
