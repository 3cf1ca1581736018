"""Runs that another run starts and waits for, with several processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distill.cli.runs import child_runs
from distill.run_folder import RunFolder
from distill.types import DistillError

FAILING = ["python", "-c", "raise SystemExit(3)"]


def test_ranks_that_wait_hear_that_the_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(DistillError, match="the teacher's run failed with exit code 3"):
        child_runs.run_once(run.path, FAILING, "teacher")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DistillError, match=r"rank 1: rank 0 could not train the teacher: .*exit code 3"):
        child_runs.run_once(run.path, FAILING, "teacher")


def test_a_failure_of_an_earlier_launch_does_not_stop_the_ranks_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.error.write_text("of yesterday")
    os.utime(run.error, (child_runs.STARTED - 60, child_runs.STARTED - 60))

    def finish(seconds: float) -> None:  # rank 0 trains the run in the meantime
        for file in (run.summary, run.description, run.student):
            file.touch()

    monkeypatch.setattr("time.sleep", finish)
    monkeypatch.setenv("RANK", "1")
    child_runs.run_once(run.path, FAILING, "teacher")
    assert run.finished
