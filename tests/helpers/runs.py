"""Runs small enough for seconds: their overrides, a process of its own for one, and what it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TINY_MODEL = [
    "model.backbone.depth=10",
    "model.backbone.width=0.25",
    "model.neck_channels=16",
    "model.backbone.norm=batch",
    "model.backbone.trainable_stages=5",
    "model.backbone.weights=null",
]
TINY_HEADS = [
    "model.head_channels=16",
    "model.rpn_pre_nms_top_n_train=50",
    "model.rpn_post_nms_top_n_train=20",
    "model.rpn_pre_nms_top_n_test=50",
    "model.rpn_post_nms_top_n_test=20",
    "model.box_batch_size_per_image=16",
]
TINY_QUERIES = [
    *("model.backbone.width=0.25", "model.backbone.weights=null", "model.neck_channels=16", "model.encoder_ffn=16"),
    *("model.decoder_channels=16", "model.decoder_ffn=16", "model.queries=10", "model.denoising=4"),
]
"""Of a set-prediction detector. The recipe's numbers of layers and levels stay."""
TINY_DATA = [
    "data.source.train=8",
    "data.source.val=4",
    "data.source.test=0",
    "data.source.size=64",
    "data.min_size=64",
    "data.max_size=64",
    "data.batch_size=4",
]
TINY_RUN = [
    "schedule.epochs=1",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "pictures=1",
    "cost=0",
    "callbacks.history.curves=false",  # matplotlib takes longer than the rest of the run
]
TINY = [*TINY_DATA, *TINY_MODEL, *TINY_HEADS, *TINY_RUN]

Cli = Callable[[Sequence[str]], int]


@contextmanager
def started(lines: Sequence[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """``distill train`` in a process group of its own, of which nothing outlives the test."""
    command = [sys.executable, "-m", "distill", "train", *lines]
    kept: dict[str, Any] = {"cwd": folder, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **kept, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(ready: Callable[[], object], process: subprocess.Popen[str], seconds: float = 900) -> None:
    """Until something is so, while a process lives."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def summary(run: Path) -> dict[str, Any]:
    """What a finished run reports of itself."""
    report: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return report
