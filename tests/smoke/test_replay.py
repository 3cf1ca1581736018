"""A run that stops for numbers that are not finite names a command, and the command does the step again."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest

from distill.cli.config import compose
from distill.training.nonfinite import NonFiniteGuard
from helpers.runs import TINY, Cli


def test_the_guard_s_keys_are_its_parameters_at_their_defaults() -> None:
    node = compose.compose_config(["paths.run=x"]).guard
    parameters = inspect.signature(NonFiniteGuard).parameters
    assert {str(key) for key in node} - {"_target_"} == set(parameters)
    assert {name: parameters[name].default for name in ("limit", "scale_floor")} == {
        name: node[name] for name in ("limit", "scale_floor")
    }


def test_the_command_that_a_stopped_run_names_does_its_step_again(
    cli: Cli, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "distill=defeat",
        f"teacher.weights={tiny_teacher}",
        *TINY,
        "schedule.warmup_steps=0",
        "schedule.optimizer.lr=1e25",
    ]
    assert cli(["train", *lines, "guard.limit=0", "hydra.run.dir='a run'"]) == 1
    said = capsys.readouterr().err
    assert "step 1: the loss is not finite in" in said
    command = shlex.split(said.split("Do the step again: ")[1])
    assert command[:4] == ["python", "-m", "distill", "replay"]
    assert cli(command[3:]) == 1
    again = " ".join(capsys.readouterr().out.split())
    assert "step 1, epoch 0, rank 0" in again
    assert "defeat/neck.foreground" in again
    assert "nan" in again
