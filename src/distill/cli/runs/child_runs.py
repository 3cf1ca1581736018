"""Runs in processes of their own, which a sweep or a student's run starts and waits for: jobs, teachers, baselines."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from distill.cli.signals import Terminated
from distill.files import write_text
from distill.quoting import quote_value
from distill.run_folder import RunFolder
from distill.types import DistillError

RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_", "LOCAL_", "SLURM_", "TORCHELASTIC_", "PL_"),
)
"""Prefixes of environment variables that make a process part of a distributed run."""
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop."""
STARTED = time.time()
"""About when this process began."""


def child_environment() -> dict[str, str]:
    """The environment for another run: without the variables that make this process part of a distributed run."""
    return {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}


def wait_for_process(
    process: subprocess.Popen[str] | subprocess.Popen[bytes], work: Callable[[], Any] | None = None
) -> int:
    """Wait for a run in another process, and return its exit code.

    If this process has to stop, it first stops the run, and the run gets the time to save.

    Args:
        process: a run of distill.
        work: called while waiting; after a signal it is called again, until the process has ended.

    Raises:
        Terminated, KeyboardInterrupt: this process was asked to stop, and the other process has ended.
    """
    stop: BaseException | None = None
    while True:
        try:
            if work:
                work()
            code = process.wait()
            break
        except (Terminated, KeyboardInterrupt) as stopped:
            # Send SIGTERM after ctrl-C too: a terminal signals all processes, but `kill` may signal this process only.
            stop = stop or stopped
            process.terminate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if stop is not None:
        raise stop
    return code


def train_command(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The words of the command that trains a run into this folder."""
    run_dir = f"hydra.run.dir={quote_value(str(folder), mark=chr(34))}"  # readable inside a shell's single quotes
    return ["python", "-m", "distill", "train", *overrides, run_dir]


def run_once(folder: Path, command: Sequence[str], model: str) -> None:
    """Train a run that several runs share, or resume it, unless it is finished. Rank 0 trains; other ranks wait.

    Args:
        folder: folder of the run.
        command: from `train_command`.
        model: what the run trains, for messages: ``teacher`` or ``baseline``.

    Raises:
        DistillError: the run failed.
        Terminated, KeyboardInterrupt: this process was asked to stop, and the run has saved.
    """
    if rank() != 0:
        _wait(folder, model)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    error = RunFolder(folder).error
    with FileLock(f"{folder}.lock") as lock:
        if not RunFolder(folder).finished:
            error.unlink(missing_ok=True)
            try:
                _run(folder, list(command), model, lock)
            except BaseException as failed:  # tells the other ranks, which wait for the run
                folder.mkdir(exist_ok=True)
                write_text(error, str(failed) or type(failed).__name__)
                raise


def rank() -> int:
    """The rank of this process, before torch's process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))


def _run(folder: Path, command: list[str], model: str, lock: BaseFileLock) -> None:
    state = f"no {model} is cached; training one first"
    if RunFolder(folder).resumable:
        command, state = [*command, "ckpt_path=last"], f"the training of the {model} was stopped; it is resumed"
    print(f"distill: {state}:\n  {shlex.join(command)}", flush=True)
    # A separate process, so that neither its random state nor its memory affects this run.
    # The process inherits the lock: if this run is killed, the child's run continues, and no other one may start.
    held = [fd for fd in (lock._context.lock_file_fd,) if fd is not None]
    with subprocess.Popen([sys.executable, *command[1:]], env=child_environment(), pass_fds=held) as process:
        code = wait_for_process(process)
    if code in STOPPED:
        raise Terminated
    if code or not RunFolder(folder).finished:
        raise DistillError(
            f"the {model}'s run failed with exit code {code}; its files are in {folder}. Run it by hand:\n"
            f"  {shlex.join(command)}"
        )


def _wait(folder: Path, model: str, patience: float = 24 * 3600) -> None:
    start, run = time.monotonic(), RunFolder(folder)
    while not run.finished:
        if run.error.is_file() and run.error.stat().st_mtime >= STARTED:  # an older one is of an earlier attempt
            raise DistillError(f"rank {rank()}: rank 0 could not train the {model}: {run.error.read_text()}")
        if time.monotonic() - start > patience:
            raise DistillError(
                f"rank {rank()} waited {patience / 3600:.0f} h for rank 0 to train the {model} in {folder}"
            )
        time.sleep(2)
