"""Signals that stop a run: SIGTERM, SIGUSR1 and ctrl-C.

A stopped run prints how to resume it. If SLURM stopped the run, the run asks SLURM to start the job again. SIGTERM ends
the run at once, except during training: there `callbacks.checkpoints.LastCheckpoint` finishes the step and saves first.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class Terminated(BaseException):
    """A signal ended the run. The message says how to resume it."""


EXIT_REASONS = {
    Terminated: ("stopped by a signal", signal.SIGTERM),
    KeyboardInterrupt: ("interrupted", signal.SIGINT),
}
"""Exception -> printed reason, and signal for the exit code (128 + signal)."""
RESTART_ADVICE = "start it again with the same arguments"
"""Printed for a run that has no checkpoint."""

REPEATED_SIGNAL_SECONDS = 10.0
"""A SIGTERM within this time after another one is ignored, so that the reaction to the first is not interrupted."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside this context SIGTERM raises `Terminated`. SIGUSR1 does the same, and also requeues the job under SLURM.

    Lightning keeps an existing handler of SIGUSR1. Its own handler would save in the middle of a step.
    """
    requeue_signals: list[int] = []
    last_signal = -math.inf

    def end(number: int, frame: Any) -> None:
        nonlocal last_signal
        if time.monotonic() - last_signal > REPEATED_SIGNAL_SECONDS:
            last_signal = time.monotonic()
            raise Terminated

    def requeue(number: int, frame: Any) -> None:
        requeue_signals.append(number)
        signal.raise_signal(signal.SIGTERM)

    with ExitStack() as handlers:
        handlers.enter_context(signal_handler(signal.SIGTERM, end))
        handlers.enter_context(signal_handler(signal.SIGUSR1, requeue))
        try:
            yield
        except Terminated:
            # Ignore further signals while the run ends: SLURM sends another SIGTERM to a job that it requeues.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                handlers.enter_context(signal_handler(number, lambda *_: None))
            if requeue_signals:
                _requeue_slurm_job()
            raise


@contextmanager
def signal_handler(number: signal.Signals, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Set a signal handler inside the context. Only the main thread can set handlers; other threads do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _requeue_slurm_job() -> None:
    """Ask SLURM to start this job again. Only the first process of a job asks."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", name], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"distill: scontrol requeue {name} failed: {error}")
