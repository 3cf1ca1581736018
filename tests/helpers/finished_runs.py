"""Folders of finished runs that nobody trained: the files that a comparison reads, with given numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill import __version__

CLASSES = ("cat", "dog")


def write_run(
    folder: Path,
    ap: float,
    losses: Sequence[str] = (),
    seed: int = 0,
    seconds: Sequence[float] = (10.0, 10.0),
    words: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    classes: Sequence[str] = CLASSES,
    teacher: str | None = None,
) -> Path:
    """Write a finished run: 5 steps an epoch, and a second of evaluation in every epoch.

    Args:
        folder: the run's folder.
        ap: its AP on test.
        losses: names of its distillation losses; its teacher has AP 0.5.
        seed: its seed.
        seconds: the duration of each epoch.
        words: its overrides.
        settings: entries of its configuration.
        summary: entries of its summary.
        classes: the student's classes.
        teacher: folder of its teacher; None: a folder beside it.
    """
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "data": {"seed": seed, "batch_size": 4, "workers": 2},
        "schedule": {"epochs": len(seconds), "milestones": [1], "steps": -1},
        "trainer": {"max_steps": -1},
        "distill": {"losses": {name: {"weight": 1.0, "seed": seed} for name in losses}},
        "teacher": {"seed": 0},
        **(settings or {}),
    }
    source = teacher or str(folder.parent / "teacher")
    identity = {"source": source, "values": {"test/AP": 0.5, "test/AP50": 0.8}}
    content = {
        "student": {"val/AP": ap + 0.01, "test/AP": ap, "test/AP50": 1.5 * ap},
        "losses": list(losses),
        "teacher": identity if losses else None,
        "measured": {"data": {"val": "a", "test": "b"}},
        "versions": {"distill": __version__},
        **(summary or {}),
    }
    rows = [f"{number},{5 * number},{time},1.0" for number, time in enumerate(seconds, 1)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,seconds,evaluation_seconds", *rows, ""]))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(yaml.safe_dump([*words, f"seed={seed}"]))
    (folder / "summary.json").write_text(json.dumps(content))
    (folder / "student.json").write_text(json.dumps({"format": 2, "model": {"classes": list(classes)}}))
    (folder / "student.pt").write_bytes(b"weights")
    return folder
