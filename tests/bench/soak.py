"""A long run of small images, watched from outside: memory, open files and threads must not grow.

    python tests/bench/soak.py --minutes 60 [--folder DIR] [overrides of train.py ...]

Trains for the given time, with loader workers, an evaluation and a checkpoint each epoch and a save every 50 steps.
Then sends SIGTERM and expects exit code 143. Samples every few seconds the memory of the run and its children, and the
open files and threads of the run itself. The first third is warm-up. In the rest, growth is the median of the last
quarter compared with the median of the first quarter. The exit code is 1 if something grew or the run did not end as
expected. `soaked.py` does the same in a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

TRAIN = Path(__file__).parents[2] / "train.py"
LIMITS = {"memory, MiB": 0.03, "open files": 0.0, "threads": 0.0, "children": 0.0}
"""What may be gained, as a share: memory breathes, the rest is counted."""
LINES = [
    "model=frcnn_r18_mini",
    "distill=defeat_full",
    "teacher=frcnn_r18_mini",
    'teacher.run=["schedule.epochs=1"]',
    "data.source.train=96",
    "data.source.val=32",
    "data.source.test=0",
    "data.workers=1",
    "schedule.epochs=100000",
    "trainer.save_every='50 steps'",
    "pictures=2",
]
"""A run that never ends by itself, and does all that a run does."""


def memory(process: psutil.Process) -> float:
    """MiB that no file backs, a page that several processes share in equal parts to each.

    How much of a library's pages is this process's depends on who else has it open, and would come and go with them.
    """
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    held = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return (held["Pss_Anon"] + held["Pss_Shmem"]) / 2**10


def sample(run: psutil.Process) -> dict[str, float]:
    """What the run holds now."""
    children = run.children(recursive=True)
    held = memory(run)
    for process in children:
        with contextlib.suppress(OSError):  # it has ended since
            held += memory(process)
    return {
        "memory, MiB": held,
        "open files": run.num_fds(),
        "threads": run.num_threads(),
        "children": len(children),
    }


def growth(
    samples: Sequence[dict[str, float]], limits: Mapping[str, float] = LIMITS
) -> dict[str, tuple[float, float, bool]]:
    """Name -> the medians of the first and the last quarter, and whether that is more than may be gained."""
    quarter, found = max(1, len(samples) // 4), {}
    for name, limit in limits.items():
        first, last = (
            statistics.median(each[name] for each in part) for part in (samples[:quarter], samples[-quarter:])
        )
        found[name] = (first, last, last > first * (1 + limit))
    return found


def soak(folder: Path, lines: list[str], minutes: float, every: float) -> tuple[list[dict[str, float]], int]:
    """The samples of a run that is ended by SIGTERM, and its exit code. The clock starts with its first epoch."""
    overrides = [*LINES, *lines, f"hydra.run.dir={folder / 'run'}", f"paths.outputs={folder}"]
    samples: list[dict[str, float]] = []
    with (folder / "log.txt").open("w") as log:
        run = subprocess.Popen([sys.executable, str(TRAIN), *overrides], stdout=log, stderr=log, cwd=folder)
        try:
            watched = psutil.Process(run.pid)
            while run.poll() is None and not (folder / "run" / "steps.csv").exists():
                time.sleep(every)
            end = time.monotonic() + 60 * minutes
            while run.poll() is None and time.monotonic() < end:
                time.sleep(every)
                samples.append(sample(watched))
            run.send_signal(signal.SIGTERM)
            return samples, run.wait(300)
        finally:
            run.kill()


def main() -> int:
    """Print what grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    samples, code = soak(folder.resolve(), args.overrides, args.minutes, args.every)
    (folder / "samples.json").write_text(json.dumps(samples))
    settled = samples[len(samples) // 3 :]
    steps = (folder / "run" / "steps.csv").read_text().count("\n")
    print(f"{args.minutes} min, {len(samples)} samples, {steps} lines of steps.csv, exit code {code} (143 expected)")
    good = code == 143 and len(settled) >= 4
    for name, (first, last, grew) in growth(settled).items() if settled else ():
        good &= not grew
        print(f"{name:14} {first:10.1f} -> {last:10.1f}   {'GREW' if grew else 'ok'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
