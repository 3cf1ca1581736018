"""Kills runs repeatedly and resumes them: ``python kill_runs.py events|moments FOLDER SEED KILLS OVERRIDES...``.

Every attempt is a separate process, forked from this process before it has computed anything. SIGKILL ends the attempt:
at an event that the seed chooses, or at a moment in time, whatever the attempt does then. Prints one line per attempt.
"""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

# Whatever is imported here need not be imported by each attempt.
from distill.cli.commands import train  # noqa: F401
from distill.cli.config import override_checks
from distill.cli.main import main
from distill.cli.reports import run_report as reports
from distill.training import checkpoint_io
from distill.training.distiller import Distiller

EVENTS: dict[str, tuple[Any, str, int]] = {
    "in a step": (Distiller, "on_before_optimizer_step", 8),
    "after a step": (Distiller, "on_train_batch_end", 8),
    "before an epoch": (Distiller, "on_train_epoch_start", 2),
    "in an evaluation": (Distiller, "validation_step", 2),
    "after an evaluation": (Distiller, "on_validation_epoch_end", 2),
    "in the writing of a checkpoint": (None, "", 4),
    "between two renamings": (Path, "replace", 8),
    "at the end": (reports, "save_student", 1),
}
"""Event -> what to patch, and among how many of its calls one is chosen."""
ORPHANED = 60.0
"""Seconds in which a loader has to notice that its run is gone: torch lets it look every five."""


def arm(event: str, call: int) -> None:
    """Kill this process at the call of that number, counted from 1."""
    left = [call]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            print(event, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if event == "in the writing of a checkpoint":
        whole = checkpoint_io.atomic_write

        def half(path: Path, write: Callable[[Any], object], keep: Path | None = None) -> Path:
            def written(file: Any) -> None:
                if left[0] == 1:
                    file.write(b"half a checkpoint")
                    file.flush()
                strike()
                write(file)

            return whole(path, written, keep)

        checkpoint_io.atomic_write = half
        return
    owner, name, _ = EVENTS[event]
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs) if name == "replace" else None
        strike()
        return done if name == "replace" else original(*args, **kwargs)

    setattr(owner, name, patched)


def started(event: str | None, call: int, folder: Path, lines: list[str]) -> int:
    """One process, in a group of its own with its loaders; its id, which is the group's."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if event:
            arm(event, call)
        os.dup2(log, 2)
        code = 1
        try:
            code = main(["train", *lines])
        finally:
            os._exit(code)
    return child


def attempt(event: str | None, call: int, folder: Path, lines: list[str]) -> int:
    """The exit code of one process, negative where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(started(event, call, folder, lines), 0)[1])


def going_on(run: Path) -> list[str]:
    """What to add to the words of a run, whose folder this is, that may have been killed."""
    found = ["ckpt_path=last"] if list((run / "checkpoints").glob("last*.ckpt")) else []
    return [f"hydra.run.dir={run}", *found]


def kill_at_events(folder: Path, seed: int, lines: list[str], kills: int) -> None:
    """The whole run first, then the one that is killed."""
    rng = random.Random(seed)
    assert attempt(None, 0, folder, [*lines, *going_on(folder / "whole")]) == 0
    events = [*EVENTS, *rng.choices(list(EVENTS)[:-1], k=kills - len(EVENTS))]
    last = events.pop(list(EVENTS).index("at the end"))
    rng.shuffle(events)
    for event in [*events, last, None]:
        here = [*lines, *going_on(folder / "killed")]
        code = attempt(event, rng.randint(1, EVENTS[event][2]) if event else 0, folder, here)
        assert code == (-signal.SIGKILL if event else 0), (event, code)
    print("done")


def members(group: int) -> list[psutil.Process]:
    """Who lives in a group of processes."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_after(seconds: float, child: int) -> tuple[int, int]:
    """Exit code of a process that is killed after `seconds` unless it has ended, and its number of loaders then."""
    deadline, loaders = time.monotonic() + seconds, 0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.002)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline, loaders = math.inf, sum(each.pid != child for each in members(child))
    return os.waitstatus_to_exitcode(ended[1]), loaders


def kill_at_moments(folder: Path, seed: int, lines: list[str], kills: int) -> None:
    """Kill at moments drawn uniformly from the duration of a whole run. If a run ends earlier, the next one starts."""
    rng = random.Random(seed)
    begun = time.monotonic()
    assert attempt(None, 0, folder, [*lines, *going_on(folder / "whole")]) == 0
    lasted = time.monotonic() - begun
    groups, runs, left = [], 0, kills
    while left or not (folder / f"killed{runs}" / "summary.json").is_file():
        run = folder / f"killed{runs}"
        words = going_on(run)
        after = rng.uniform(0, lasted) if left else math.inf
        begun = time.monotonic()
        groups.append(started(None, 0, folder, [*lines, *words]))
        code, loaders = kill_after(after, groups[-1])
        assert code in (0, -signal.SIGKILL), code
        if code:
            left -= 1
            print(f"killed{runs} after {after:.2f} of {lasted:.2f} s, {loaders} loaders, {len(words) - 1} resumed")
        elif left:
            runs += 1
            # The machine was busier when the first one ran: moments past a run's end would be nobody's.
            lasted = lasted if len(words) > 1 else min(lasted, time.monotonic() - begun)
    deadline = time.monotonic() + ORPHANED
    while alone := [each for group in groups for each in members(group)]:
        assert time.monotonic() < deadline, alone
        time.sleep(0.1)
    print("done")


if __name__ == "__main__":
    kill = {"events": kill_at_events, "moments": kill_at_moments}[sys.argv[1]]
    override_checks.validate_overrides(sys.argv[5:])  # once for all attempts: what Hydra keeps, its parsers
    gc.freeze()
    kill(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[5:], int(sys.argv[4]))
