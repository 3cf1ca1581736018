"""Locks of run folders: two processes cannot train the same run. The file descriptors of locks across processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from distill.cli.runs.child_runs import rank
from distill.run_folder import RunFolder
from distill.types import DistillError

LOCK_TIMEOUT = 10.0
"""Seconds to wait for the lock of a run whose process is about to end."""
_held: list[int] = []
"""File descriptors of the run locks that this process holds."""


def _close_inherited_locks() -> None:
    while _held:
        with suppress(OSError):  # the library of the lock closes it, too
            os.close(_held.pop())


# Loader processes outlive a killed run by some seconds. They must not hold its lock, because a resume would wait.
os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold the lock of a run's folder while the run is trained. Ranks above 0 write no checkpoints, and need no lock.

    Raises:
        DistillError: another process trains the run.
    """
    lock = FileLock(run.lock, timeout=LOCK_TIMEOUT)
    if rank() == 0:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            _held.extend(descriptors(lock))
        except Timeout:
            raise DistillError(
                f"{run.path} is in use by another process, which trains this run: wait until it has ended, or choose "
                "another folder with hydra.run.dir=DIR"
            ) from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass
    try:
        yield
    finally:
        _held.clear()
        lock.release()


def is_locked(run: Path) -> bool:
    """Whether a process trains a run."""
    try:
        with FileLock(RunFolder(run).lock, blocking=False):
            return False
    except Timeout:
        return True


def descriptors(lock: BaseFileLock) -> list[int]:
    """The file descriptor of a held lock, for a process that inherits the lock; empty for a lock that is not held."""
    descriptor = lock._context.lock_file_fd  # filelock has no public name for it
    return [] if descriptor is None else [descriptor]
