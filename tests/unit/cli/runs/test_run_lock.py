"""The lock of a run, across processes and forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from distill.cli.runs import run_lock
from distill.run_folder import RunFolder
from distill.types import DistillError


def test_a_run_that_is_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LOCK_TIMEOUT", 0.05)
    run = tmp_path / "run"
    with run_lock.locked(RunFolder(run)):
        assert run_lock.is_locked(run)
        with pytest.raises(DistillError, match="run is in use by another process"), run_lock.locked(RunFolder(run)):
            pass
    assert not run_lock.is_locked(run)


def test_a_process_with_the_descriptors_keeps_the_lock(tmp_path: Path) -> None:
    """So a run of its own process stays locked if the process that started it is killed."""
    lock = FileLock(tmp_path / "lock")
    assert run_lock.descriptors(lock) == []
    with lock:
        held = run_lock.descriptors(lock)
        child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=held, stdin=subprocess.PIPE)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), held[0])  # this process gives its descriptor up, as if it was killed
        with pytest.raises(TimeoutError):
            FileLock(tmp_path / "lock", blocking=False).acquire()
        child.communicate(b"\n")
        FileLock(tmp_path / "lock", blocking=False).acquire()


def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    receive, send = os.pipe()
    with run_lock.locked(run):
        child = os.fork()
        if child == 0:  # a loader process, which outlives its run
            os.read(receive, 1)
            os._exit(0)
    try:
        assert not run_lock.is_locked(run.path)
    finally:
        os.write(send, b"x")
        os.waitpid(child, 0)
