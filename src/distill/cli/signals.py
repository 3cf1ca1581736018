"""A run that is asked to stop, at any moment: it says how to go on, and where SLURM asked has itself started again.

SIGTERM ends the run at once, from its first line to its last. Only while steps are made `callbacks.checkpoints.LastCheckpoint` stands in: it
lets a step come to its end, and saves.
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
"""Exception -> what is printed, and the signal that the exit code reports (128 + signal)."""
RESTART_ADVICE = "start it again with the same arguments"
"""Printed for a run that left nothing to resume from."""

REPEATED_SIGNAL_SECONDS = 10.0
"""Seconds after a SIGTERM in which another one is the same wish: it does not break off what the first one set going."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, and SIGUSR1 does what SIGTERM does; under SLURM the job is then requeued.

    Lightning leaves a handler of SIGUSR1 alone that is there already; its own would save in the middle of a step.
    """
    asked: list[int] = []
    told = -math.inf

    def end(number: int, frame: Any) -> None:
        nonlocal told
        if time.monotonic() - told > REPEATED_SIGNAL_SECONDS:
            told = time.monotonic()
            raise Terminated

    def requeue(number: int, frame: Any) -> None:
        asked.append(number)
        signal.raise_signal(signal.SIGTERM)

    with ExitStack() as handlers:
        handlers.enter_context(signal_handler(signal.SIGTERM, end))
        handlers.enter_context(signal_handler(signal.SIGUSR1, requeue))
        try:
            yield
        except Terminated:
            # It is ending: SLURM sends another SIGTERM to a job that it starts again.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                handlers.enter_context(signal_handler(number, lambda *_: None))
            if asked:
                _requeue_slurm_job()
            raise


@contextmanager
def signal_handler(number: signal.Signals, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, a signal is handled so, in the main thread; no other may say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def wait_for_process(
    process: subprocess.Popen[str] | subprocess.Popen[bytes], work: Callable[[], Any] | None = None
) -> int:
    """Wait until a process has ended; its exit code. Whatever ends this run ends it too, with the time to save.

    Args:
        process: a run of ours.
        work: what to do meanwhile; called again when it was interrupted by a signal, as long as the process lives.

    Raises:
        Terminated, KeyboardInterrupt: this run was asked to stop, and the other has stopped.
    """
    asked: BaseException | None = None
    while True:
        try:
            if work:
                work()
            code = process.wait()
            break
        except (Terminated, KeyboardInterrupt) as stopped:
            # SIGTERM after ctrl-C too: the terminal tells all processes, but somebody else may have told this one alone.
            asked = asked or stopped
            process.terminate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if asked is not None:
        raise asked
    return code


def _requeue_slurm_job() -> None:
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
