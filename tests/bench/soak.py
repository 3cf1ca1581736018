"""A long run of small images, watched from outside: memory, open files and threads must not grow.

    python tests/bench/soak.py --minutes 60 [--folder DIR] [overrides of train.py ...]

Trains for as long as is said, with loader workers, an evaluation and a checkpoint each epoch and a save every 50 steps; then sends SIGTERM
and expects 143. Sampled every few seconds: memory of the run and its children (each page counted once: PSS), open files and
threads of the run itself. The first third is warm-up; over the rest, growth is how far the median of the last quarter is above
that of the first. Exit code 1 where something grew, or the run did not end as it should.
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


def sample(run: psutil.Process) -> dict[str, float]:
    """What the run holds now."""
    children = run.children(recursive=True)
    memory = 0.0
    for process in [run, *children]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory += process.memory_full_info().pss / 2**20
    return {
        "memory, MiB": memory,
        "open files": run.num_fds(),
        "threads": run.num_threads(),
        "children": len(children),
    }


def growth(values: list[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[:quarter]), statistics.median(values[-quarter:])


def soak(folder: Path, lines: list[str], minutes: float, every: float) -> tuple[list[dict[str, float]], int]:
    """The samples of a run that is ended by SIGTERM, and its exit code. The clock starts with its first epoch."""
    overrides = [*LINES, *lines, f"hydra.run.dir={folder / 'run'}", f"paths.outputs={folder}"]
    samples: list[dict[str, float]] = []
    with (folder / "log.txt").open("w") as log:
        run = subprocess.Popen([sys.executable, str(TRAIN), *overrides], stdout=log, stderr=log, cwd=folder)
        try:
            watched = psutil.Process(run.pid)
            while run.poll() is None and not (folder / "run" / "metrics.csv").exists():
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
    steps = (folder / "run" / "metrics.csv").read_text().count("\n")
    print(f"{args.minutes} min, {len(samples)} samples, {steps} lines of metrics.csv, exit code {code} (143 expected)")
    good = code == 143 and len(settled) >= 4
    for name, limit in LIMITS.items() if settled else ():
        first, last = growth([each[name] for each in settled])
        grew = last > first * (1 + limit)
        good &= not grew
        print(f"{name:14} {first:10.1f} -> {last:10.1f}   {'GREW' if grew else 'ok'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
