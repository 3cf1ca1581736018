"""A run that is asked to stop: it saves, says how to go on, and where SLURM asked has itself started again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distill.cli import Terminated


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGUSR1 does what SIGTERM does: the run saves after its step and ends. Under SLURM the job is then requeued.

    Lightning leaves a handler of SIGUSR1 alone that is there already; its own would save in the middle of a step.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        signal.raise_signal(signal.SIGTERM)

    with handled(signal.SIGUSR1, stop):
        try:
            yield
        except (SIGTERMException, Terminated):
            if asked:
                _requeue()
            raise Terminated from None


@contextmanager
def handled(number: signal.Signals, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, a signal is handled so, in the main thread; no other may say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _requeue() -> None:
    """Ask SLURM to start this job again; one process asks for all."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", name], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"distill: scontrol requeue {name} failed: {error}")
