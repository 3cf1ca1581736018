"""What a run says before it trains a teacher."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from distill.cli.reports.teacher_notice import smaller_command


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (["distill=defeat", "model=frcnn_r50"], ["distill=defeat"]),
        (["data=a b", "model=frcnn_r50", "start=imagenet", "teacher.seed=2", "hydra.run.dir=r"], ["data=a b"]),
        (["model.backbone.depth=50"], []),
        (["distill=defeat"], None),
    ],
)
def test_the_command_with_small_models(lines: list[str], kept: list[str] | None) -> None:
    plan: Any = SimpleNamespace(overrides=lines)
    command = smaller_command(plan)
    assert command is None if kept is None else shlex.split(command or "")[4:] == kept
