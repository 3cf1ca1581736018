"""A run holds no more after many epochs than after a few: memory, open files, threads and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.runs import TINY_HEADS, TINY_MODEL

SOAKED = Path(__file__).parents[1] / "bench" / "soaked.py"
LINES = ["distill=none", "trainer.accelerator=cpu", "pictures=0", "trainer.save_every=2 steps", "data.workers=1"]
LINES += ["data.source.train=24", "data.source.val=4", "data.source.test=0", "data.batch_size=4"]
LINES += ["data.source.size=128", "data.min_size=128", "data.max_size=128"]


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' account of a process's memory")
def test_nothing_grows_with_the_epochs_but_what_is_kept_on_purpose(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAKED), str(tmp_path / "run"), *TINY_MODEL, *TINY_HEADS, *LINES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    samples = (tmp_path / "run" / "samples.json").read_text()
    assert {name: grew for name, (*_, grew) in found["clean"].items() if grew} == {}, samples
    assert [name for name, (*_, grew) in found["leaking"].items() if not grew] == [], samples
    assert found["clean"]["children"][0] >= 1  # the loaders
