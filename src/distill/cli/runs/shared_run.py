"""Runs that several runs share, such as a teacher or the student alone. Each is trained once, in its own folder."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock, FileLock
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli.config.compose import compose_config
from distill.cli.config.composition_errors import explain_failure
from distill.cli.runs.child_runs import STOPPED, child_environment, rank, wait_for_process
from distill.cli.runs.run_lock import descriptors
from distill.cli.signals import Terminated
from distill.files import write_text
from distill.quoting import quote_value
from distill.run_folder import RunFolder
from distill.types import DistillError

STARTED = time.time()
"""Approximate start of this process, in seconds since the epoch."""


class SharedRun(NamedTuple):
    """A run in a folder of its own, which is trained once for all runs that need it."""

    model: str
    """What the run trains, in messages and as its ``role``: ``teacher`` or ``baseline``."""
    folder: Path
    overrides: Sequence[str] = ()
    """Overrides of the run that trains it."""

    @property
    def finished(self) -> bool:
        """Whether the folder has the student and the results of the finished run."""
        return RunFolder(self.folder).finished

    @property
    def command(self) -> list[str]:
        """The words of the command that trains the run."""
        # Double quotes are readable inside a shell's single quotes.
        run_dir = f"hydra.run.dir={quote_value(str(self.folder), mark=chr(34))}"
        return ["python", "-m", "distill", "train", *self.overrides, f"role={self.model}", run_dir]

    def train(self) -> None:
        """Train the run, or resume it, unless it is finished. Rank 0 trains; other ranks wait.

        Raises:
            DistillError: the run failed.
            Terminated, KeyboardInterrupt: this process was asked to stop, and the run has saved.
        """
        if self.finished:
            return
        if rank() != 0:
            _wait(self)
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        error = RunFolder(self.folder).error
        with FileLock(f"{self.folder}.lock") as lock:
            if self.finished:
                return
            error.unlink(missing_ok=True)
            try:
                _train(self, lock)
            except BaseException as failed:  # tells the other ranks, which wait for the run
                self.folder.mkdir(exist_ok=True)
                write_text(error, str(failed) or type(failed).__name__)
                raise


def _train(run: SharedRun, lock: BaseFileLock) -> None:
    command, state = run.command, f"no {run.model} is cached; training one first"
    if RunFolder(run.folder).resumable:
        command, state = [*command, "ckpt_path=last"], f"the training of the {run.model} was stopped; it is resumed"
    print(f"distill: {state}:\n  {shlex.join(command)}", flush=True)
    # A separate process, so that neither its random state nor its memory affects this run.
    # The process inherits the lock: if this run is killed, the child's run continues, and no other one may start.
    with subprocess.Popen(
        [sys.executable, *command[1:]], env=child_environment(), pass_fds=descriptors(lock)
    ) as process:
        code = wait_for_process(process)
    if code in STOPPED:
        raise Terminated
    if code or not run.finished:
        raise DistillError(
            f"the {run.model}'s run failed with exit code {code}; its files are in {run.folder}. Run it by hand:\n"
            f"  {shlex.join(command)}"
        )


def _wait(run: SharedRun, patience: float = 24 * 3600) -> None:
    start, error = time.monotonic(), RunFolder(run.folder).error
    while not run.finished:
        if error.is_file() and error.stat().st_mtime >= STARTED:  # an older one is of an earlier attempt
            raise DistillError(f"rank {rank()}: rank 0 could not train the {run.model}: {error.read_text()}")
        if time.monotonic() - start > patience:
            raise DistillError(
                f"rank {rank()} waited {patience / 3600:.0f} h for rank 0 to train the {run.model} in {run.folder}"
            )
        time.sleep(2)


def digest(content: Any) -> str:
    """Hash of the values that determine the result of a run. Runs with equal values share a folder or a recipe."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def compose_run(overrides: Sequence[str], model: str) -> DictConfig:
    """Compose the configuration of the run that trains a teacher or a baseline.

    Raises:
        DistillError: an override of this run is invalid.
    """
    try:
        return compose_config([*overrides, "hydra.run.dir=."])
    except (HydraException, OmegaConfBaseException) as error:
        raise DistillError(f"the {model}'s run: {explain_failure(error, list(overrides))}") from error
