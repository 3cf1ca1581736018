"""Folders of runs for a comparison: what is read of a finished one, and what is said of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill import __version__
from distill.cli.reports.comparison_report import compare_folders
from distill.cli.runs.finished_runs import expand_folders, read_run, read_runs, training_times
from distill.cli.runs.results import read_finished
from distill.run_folder import RunFolder
from distill.types import DistillError
from helpers.finished_runs import write_run


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    teacher = write_run(tmp_path / "teacher", 0.5, seconds=(100.0,))
    folder = write_run(tmp_path / "0", 0.25, ["defeat"], seed=3, seconds=(11.0, 13.0), words=["distill=defeat"])
    run = read_run(folder)
    assert (run.seed, run.losses, run.classes) == (3, ["defeat"], ["cat", "dog"])
    assert run.words == ["distill=defeat", "seed=3"]
    assert run.values["test/AP"] == 0.25
    assert run.teacher == {
        "source": str(teacher),
        "values": {"test/AP": 0.5, "test/AP50": 0.8},
        "seconds": 100.0,
    }
    assert run.seconds == 24.0
    assert run.seconds_per_step == pytest.approx((24 - 2) / 10)
    assert (run.fingerprints, run.detections) == ({"val": "a", "test": "b"}, {})


def test_times_that_older_runs_do_not_tell(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path / "0", 0.1))
    run.metrics.write_text("epoch,step,seconds\n1,5,10.0\n2,10,12.0\n")
    assert training_times(run) == (22.0, None)
    for text in ("epoch,step\n1,5\n", "", "epoch,step,seconds\n1,5,fast\n"):
        run.metrics.write_text(text)
        assert training_times(run) == (None, None)
    run.metrics.unlink()
    assert training_times(run) == (None, None)


def change(name: str, **entries: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return apply


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "summary.json").unlink(), "unfinished, it has no summary.json: start it again"),
    (lambda folder: (folder / "summary.json").write_text("{"), "not JSON"),
    (change("summary.json", versions={"distill": "99.1"}), "written by distill 99.1, newer than the installed"),
    (change("summary.json", student=None), "expected the run's results under 'student'"),
    (change("summary.json", student={"val/AP": "high"}), "expected numbers under 'student'"),
    (change("summary.json", losses=None), "names under 'losses'"),
    (change("student.json", model={}), "expected the student's 'classes'"),
    (lambda folder: (folder / "student.json").write_text("{"), "not JSON"),
    (lambda folder: (folder / "config.yaml").write_text("[]"), "expected the configuration of a run"),
    (lambda folder: (folder / "config.yaml").write_text("{data: {}, schedule: {}}"), "expected a 'seed', got None"),
]


@pytest.mark.parametrize(("spoil", "reason"), BROKEN, ids=[reason[:25] for _, reason in BROKEN])
def test_a_folder_that_is_no_finished_run_is_named_and_left_out(
    spoil: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    good, bad = write_run(tmp_path / "0", 0.1), write_run(tmp_path / "1", 0.9, seed=1)
    spoil(bad)
    answer = compare_folders([good, bad], images=False)
    ((folder, said),) = answer.left_out
    assert folder == bad
    assert reason in said
    assert str(bad) not in said  # it stands before the reason
    assert answer.rows[0].seeds == [0]
    assert answer.rows[0].values["test/AP"] == 0.1


def test_a_failed_job_and_a_folder_without_a_run_say_so(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "0", 0.1)
    (failed / "summary.json").unlink()
    (failed / "error.txt").write_text("out of memory\n")
    runs, left_out = read_runs([failed, tmp_path / "none", tmp_path])
    assert not runs
    assert left_out == [
        (failed, "failed: out of memory"),
        (tmp_path / "none", "does not exist. Expected the folder of a run or of a sweep"),
        (tmp_path, "not a run: expected the folder of a run or of a sweep"),
    ]


def test_the_baseline_that_a_run_names_is_read_too_and_is_its_reference(tmp_path: Path) -> None:
    """It is longer, so that its settings differ; two runs share it."""
    alone = write_run(tmp_path / "alone", 0.2, seconds=(10.0, 10.0, 10.0))
    named = {"baseline": {"source": str(alone), "values": {"test/AP": 0.2}}}
    jobs = [write_run(tmp_path / name, 0.3, [name], summary=named) for name in ("defeat", "dsig")]
    runs, left_out = read_runs(jobs)
    assert ([run.folder for run in runs], left_out) == ([*jobs, alone], [])
    answer = compare_folders(jobs, images=False)
    found = {row.configuration: row.difference for row in answer.rows}
    assert [found[name].reference for name in ("defeat", "dsig")] == ["none"] * 2
    assert found["defeat"].mean == pytest.approx(0.1)


def test_the_folder_of_a_sweep_stands_for_its_jobs(tmp_path: Path) -> None:
    jobs = [write_run(tmp_path / "sweep" / str(number), 0.1) for number in (0, 1, 10, 2)]
    alone = write_run(tmp_path / "alone", 0.1)
    expected = [alone, jobs[0], jobs[1], jobs[3], jobs[2], tmp_path / "gone"]
    lock = tmp_path / "alone.lock"  # the shell's * names it, too
    lock.touch()
    assert expand_folders([alone, lock, tmp_path / "sweep", jobs[0], tmp_path / "gone"]) == expected


def write_files(folder: Path, summary: Any, *files: str) -> RunFolder:
    run = RunFolder(folder)
    if summary is not None:
        run.summary.write_text(json.dumps(summary))
    for name in files:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return run


EXPORTED = ("student.pt", "student.json")
UNREADABLE = [
    (None, EXPORTED, r"unfinished, it has no summary\.json: start it again"),
    (None, (*EXPORTED, "checkpoints/last.ckpt"), "has no summary.json: python -m distill resume .* continues it"),
    ({"student": {}}, ("student.json",), r"there is no student\.pt"),
    ({"losses": []}, EXPORTED, "expected the run's results under 'student'"),
    ({"student": {}, "versions": {"distill": "99.1"}}, EXPORTED, "written by distill 99.1, newer than the installed"),
]


@pytest.mark.parametrize(("summary", "files", "message"), UNREADABLE)
def test_refused_runs(summary: Any, files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=message):
        read_finished(write_files(tmp_path, summary, *files))


@pytest.mark.parametrize("versions", [None, {}, {"distill": "0.1.0"}, {"distill": __version__}, {"distill": "mine"}])
def test_runs_of_older_versions_are_read(versions: Any, tmp_path: Path) -> None:
    summary = {"student": {"val/AP": 0.5}, "versions": versions}
    assert read_finished(write_files(tmp_path, summary, *EXPORTED)) == summary
