"""Several runs that share one teacher: one of them trains it, the others wait; one that is killed holds up nobody."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.cli.runs import shared_run
from distill.run_folder import RunFolder
from distill.types import DistillError
from helpers.two_processes import fork_server


def ask(pipe: Connection, folder: Path, seconds: float, number: int, start: Path | None) -> None:
    """What a process does that needs the teacher, whose training takes so many seconds, or is what `start` does."""

    def train(run: shared_run.SharedRun, lock: Any) -> None:
        folder = run.folder
        with open(folder.parent / "trained", "a") as log:
            log.write(f"{number}\n")
        folder.mkdir(exist_ok=True)
        (folder / "student.json").write_text("{}")
        (folder / "student.pt").write_bytes(b"")
        time.sleep(seconds)
        assert not (folder / "summary.json").exists()
        (folder / "summary.json").write_text("{}")

    if start is None:
        shared_run._train = train
    else:
        sys.executable = str(start)  # with which a teacher's run is started
    pipe.send("ready")
    pipe.recv()
    shared_run.SharedRun("teacher", folder).train()
    pipe.send("used" if RunFolder(folder).finished else "used before it was finished")


class Run(NamedTuple):
    """A process, and this end of the pipe to it."""

    process: BaseProcess
    pipe: Any

    def go(self) -> None:
        self.pipe.send("go")

    def end(self) -> str:
        """What the process says last."""
        assert self.pipe.poll(120)
        said = str(self.pipe.recv())
        self.process.join(120)
        assert self.process.exitcode == 0
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def runs(folder: Path, *seconds: float, start: Path | None = None) -> list[Run]:
    """Processes that are about to ask for the teacher."""
    found = []
    for number, each in enumerate(seconds):
        pipe, theirs = fork_server().Pipe()
        process = fork_server().Process(target=ask, args=(theirs, folder, each, number, start), daemon=True)
        process.start()
        theirs.close()
        found.append(Run(process, pipe))
    assert [run.pipe.recv() for run in found] == ["ready"] * len(found)
    return found


def wait_for(file: Path) -> None:
    start = time.monotonic()
    while not file.is_file():
        assert time.monotonic() - start < 60
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "teachers" / "one"


def test_of_two_runs_at_once_one_trains_and_both_use_it(folder: Path) -> None:
    both = runs(folder, 1.0, 1.0)
    for run in both:
        run.go()
    assert [run.end() for run in both] == ["used"] * 2
    assert len((folder.parent / "trained").read_text().split()) == 1


def test_a_run_that_is_killed_while_it_trains_does_not_hold_up_the_next(folder: Path) -> None:
    first, second = runs(folder, 600.0, 0.0)
    first.go()
    wait_for(folder / "student.json")
    second.go()
    assert not second.pipe.poll(1.0)  # it waits
    assert second.process.is_alive()
    first.kill()
    assert second.end() == "used"
    assert (folder.parent / "trained").read_text().split() == ["0", "1"]


SCRIPT = """#!/bin/sh
mkdir -p {folder}
echo started >> {folder}/../trained
touch {folder}/student.json {folder}/student.pt
sleep 3
touch {folder}/summary.json
"""


def test_a_teacher_whose_run_was_killed_is_trained_to_its_end_and_not_twice_at_once(folder: Path) -> None:
    script = folder.parent.parent / "start"
    script.write_text(SCRIPT.format(folder=folder))
    script.chmod(0o755)
    first, second = runs(folder, 0.0, 0.0, start=script)
    first.go()
    wait_for(folder / "student.json")
    first.kill()
    second.go()
    assert second.end() == "used"
    assert (folder.parent / "trained").read_text().split() == ["started"]


FAILING = ["python", "-c", "raise SystemExit(3)"]


def test_ranks_that_wait_hear_that_the_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run.SharedRun, "command", FAILING)
    run = shared_run.SharedRun("teacher", tmp_path / "run")
    with pytest.raises(DistillError, match="the teacher's run failed with exit code 3"):
        run.train()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DistillError, match=r"rank 1: rank 0 could not train the teacher: .*exit code 3"):
        run.train()


def test_a_failure_of_an_earlier_launch_does_not_stop_the_ranks_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.error.write_text("of yesterday")
    os.utime(run.error, (shared_run.STARTED - 60, shared_run.STARTED - 60))

    def finish(seconds: float) -> None:  # rank 0 trains the run in the meantime
        for file in (run.summary, run.description, run.student):
            file.touch()

    monkeypatch.setattr("time.sleep", finish)
    monkeypatch.setenv("RANK", "1")
    shared_run.SharedRun("teacher", tmp_path).train()
    assert run.finished
