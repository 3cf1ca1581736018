"""A few steps on real images, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.runs import TINY_HEADS, TINY_MODEL, TINY_RUN, Cli, summary

FOLDERS = {"bccd": "bccd/BCCD", "coco": "tiny_coco"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_few_steps_and_an_evaluation(name: str, cli: Cli, tmp_path: Path) -> None:
    top = os.environ.get("DISTILL_TEST_DATA")
    if not top:
        pytest.skip(f"set DISTILL_TEST_DATA to the folder that holds {FOLDERS[name]}")
    chosen = {"bccd": ["experiment=bccd"], "coco": ["data=coco", "model=frcnn_r18"]}[name]
    size = ["data.min_size=96", "data.max_size=128", "data.limit=8", "data.limit_eval=8", "data.batch_size=4"]
    lines = [*chosen, f"data.source.root={top}/{FOLDERS[name]}", *size, "data.workers=0", "distill=none"]
    assert cli(["train", *lines, *TINY_MODEL, *TINY_HEADS, *TINY_RUN, "hydra.run.dir=run"]) == 0
    assert 0 <= summary(tmp_path / "run")["student"]["val/AP"] <= 1
    assert cli(["evaluate", "run", "metrics.coco.per_class=true", "data.limit_eval=4"]) == 0
