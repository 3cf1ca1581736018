"""Several runs that share one teacher: one of them trains it, the others wait; one that is killed holds up nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import sys, time
from pathlib import Path
from distill.cli import child_runs, teacher_cache
from distill.run_folder import RunFolder

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def train(folder, command, model, lock):
    with open(folder.parent / "trained", "a") as log:
        log.write(f"{sys.argv[3]}\\n")
    folder.mkdir(exist_ok=True)
    (folder / "student.json").write_text("{}")
    (folder / "student.pt").write_bytes(b"")
    time.sleep(seconds)
    assert not (folder / "summary.json").exists()
    (folder / "summary.json").write_text("{}")

if len(sys.argv) < 5:
    child_runs._run = train
else:
    sys.executable = sys.argv[4]  # with which a teacher's run is started
print("ready", flush=True)
sys.stdin.readline()
found = teacher_cache.cached_run(folder, [], "auto")
assert RunFolder(found).finished, "used before it was finished"
print("used", flush=True)
"""


def runs(folder: Path, *seconds: float, start: Path | None = None) -> list[subprocess.Popen[str]]:
    """Processes that are about to ask for the teacher, in which its training takes so long, or is what `start` does."""
    more = [] if start is None else [str(start)]
    words = [
        [sys.executable, "-c", RUN, str(folder), str(each), str(number), *more] for number, each in enumerate(seconds)
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found = [subprocess.Popen(line, **pipes) for line in words]  # type: ignore[call-overload]
    for one in found:
        assert one.stdout.readline() == "ready\n"
    return found


def go(run: subprocess.Popen[str]) -> None:
    assert run.stdin is not None
    run.stdin.write("\n")
    run.stdin.flush()


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
        go(run)
    assert [run.communicate(timeout=120)[0] for run in both] == ["used\n"] * 2
    assert len((folder.parent / "trained").read_text().split()) == 1


def test_a_run_that_is_killed_while_it_trains_does_not_hold_up_the_next(folder: Path) -> None:
    first, second = runs(folder, 600.0, 0.0)
    go(first)
    wait_for(folder / "student.json")
    go(second)
    time.sleep(1.0)
    assert second.poll() is None  # it waits
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=120)[0] == "used\n"
    assert (folder.parent / "trained").read_text().split() == ["0", "1"]
    first.communicate()


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
    go(first)
    wait_for(folder / "student.json")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    go(second)
    assert second.communicate(timeout=120)[0].splitlines()[-1] == "used"
    assert (folder.parent / "trained").read_text().split() == ["started"]
