"""Kills a run again and again, and lets it go on each time: ``python killed.py FOLDER SEED OVERRIDES...``.

Every attempt is a process of its own, forked from this one before it has computed anything, and killed by SIGKILL at an
event that the seed chose. Prints one line an attempt: the event, or ``done``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Whatever is imported here need not be imported by each attempt.
import distill.callbacks.provenance
import distill.callbacks.resume  # noqa: F401
from distill.callbacks import storage
from distill.cli import main, train  # noqa: F401
from distill.cli import report as reports
from distill.module import Distiller

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


def arm(event: str, call: int) -> None:
    """Kill this process at the call of that number, counted from 1."""
    left = [call]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            print(event, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if event == "in the writing of a checkpoint":
        whole = storage.write_whole

        def half(path: Path, write: Callable[[Any], object], keep: Path | None = None) -> Path:
            def written(file: Any) -> None:
                if left[0] == 1:
                    file.write(b"half a checkpoint")
                    file.flush()
                strike()
                write(file)

            return whole(path, written, keep)

        storage.write_whole = half
        return
    owner, name, _ = EVENTS[event]
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs) if name == "replace" else None
        strike()
        return done if name == "replace" else original(*args, **kwargs)

    setattr(owner, name, patched)


def attempt(event: str | None, call: int, folder: Path, lines: list[str]) -> int:
    """One process; its exit code, negative where it was killed."""
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if event:
            arm(event, call)
        os.dup2(log, 2)
        code = 1
        try:
            code = main(["train", *lines])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(folder: Path, seed: int, lines: list[str], kills: int = 10) -> None:
    """The whole run first, then the one that is killed."""
    rng = random.Random(seed)
    assert attempt(None, 0, folder, [*lines, f"hydra.run.dir={folder / 'whole'}"]) == 0
    here = [*lines, f"hydra.run.dir={folder / 'killed'}"]
    events = [*EVENTS, *rng.choices(list(EVENTS)[:-1], k=kills - len(EVENTS))]
    last = events.pop(list(EVENTS).index("at the end"))
    rng.shuffle(events)
    for event in [*events, last, None]:
        go_on = ["ckpt_path=last"] if list((folder / "killed" / "checkpoints").glob("last*.ckpt")) else []
        code = attempt(event, rng.randint(1, EVENTS[event][2]) if event else 0, folder, [*here, *go_on])
        assert code == (-signal.SIGKILL if event else 0), (event, code)
    print("done")


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
