"""Processes of other runs: the jobs of a sweep, teachers and baselines."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from distill.cli.signals import Terminated

RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_", "LOCAL_", "SLURM_", "TORCHELASTIC_", "PL_"),
)
"""Prefixes of environment variables that make a process part of a distributed run."""
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop."""


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


def rank() -> int:
    """The rank of this process, before torch's process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))
