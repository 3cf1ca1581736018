"""A minute of `soak.py`: a run that looks at itself at each epoch's end, and at last leaks on purpose.

    python tests/bench/soaked.py FOLDER [overrides of train.py ...]

A third of the clean epochs is warm-up. The other clean epochs must not grow. The leaking epochs must grow in everything
that is sampled, which shows that a leak of this size is detected. Prints both as JSON, by name: [before, after, whether
it grew].
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
from soak import LIMITS, growth, sample

from distill.cli.main import main
from distill.training.distiller import Distiller

CLEAN, LEAKING = 24, 12
"""Epochs."""
STRICT = {**LIMITS, "memory, MiB": 0.01}
"""Limits for the clean epochs.

With ``MALLOC``, the memory at an epoch's end repeats to a tenth of a MiB. A hundredth is half of the memory of the
images of 12 epochs: six batches per epoch of four images of 128 pixels.
"""
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which glibc gives back at once what is freed, instead of when it pleases."""


def watched(folder: Path, lines: list[str]) -> list[dict[str, float]]:
    """The samples of the run. The leak is one image batch per step, and one open file, thread and child per epoch."""
    samples: list[dict[str, float]] = []
    kept: list[Any] = []
    children: list[subprocess.Popen[bytes]] = []
    step, end, over = Distiller.training_step, Distiller.on_train_epoch_end, threading.Event()

    def leak(self: Distiller, batch: Any, index: int) -> Any:
        if len(samples) >= CLEAN:
            kept.append(batch.images)
        return step(self, batch, index)

    def look(self: Distiller) -> None:
        end(self)
        if len(samples) >= CLEAN:
            kept.append(open(os.devnull))  # noqa: SIM115
            children.append(subprocess.Popen(["sleep", "600"]))
            threading.Thread(target=over.wait).start()
        gc.collect()
        samples.append(sample(psutil.Process()))

    Distiller.training_step, Distiller.on_train_epoch_end = leak, look  # type: ignore[method-assign]
    try:
        code = main(["train", *lines, f"schedule.epochs={CLEAN + LEAKING}", f"hydra.run.dir={folder}"])
    finally:
        over.set()
        for child in children:
            child.kill()
    assert code == 0
    return samples


if __name__ == "__main__":
    if not os.environ.keys() >= MALLOC.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    samples = watched(Path(sys.argv[1]), sys.argv[2:])
    (Path(sys.argv[1]) / "samples.json").write_text(json.dumps(samples))
    parts = {"clean": samples[CLEAN // 3 : CLEAN], "leaking": samples[CLEAN:]}
    print(json.dumps({name: growth(part, STRICT) for name, part in parts.items()}))
