"""Completion in a real bash, with the function that the user installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.cli.main import main

BASH = """
COMP_LINE="$1" COMP_POINT=${#1}
read -ra COMP_WORDS <<< "$1"
[[ "$1" == *' ' ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
hydra_bash_completion
printf '%s\\n' "${COMPREPLY[@]}"
"""


def query(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    assert main([*words, "-sc", "query=bash"]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "expected", "foreign"),
    [
        ("distill re", "resume", "train"),
        ("distill train distill=def", "distill=defeat", "distill=none"),
        ("distill train -m model=retinanet_r18 schedule.ep", "schedule.epochs=", "schedule.optimizer."),
        ("distill doctor --json x.json distill=none da", "data=", "model="),
        ("distill evaluate RUN metrics.coco.per", "metrics.coco.per_class=", "metrics.coco._target_="),
    ],
)
def test_verbs_groups_and_keys(
    line: str, expected: str, foreign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = query(line, monkeypatch, capsys)
    assert expected in found
    assert foreign not in found


def test_the_script_completes_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "distill=defeat" in query("python train.py distill=def", monkeypatch, capsys, "train")


@pytest.mark.parametrize(
    "line", ["distill predict RUN ima", "distill resume ou", "distill evaluate ", "distill nothing x"]
)
def test_the_shell_completes_paths(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert query(line, monkeypatch, capsys) == []


@pytest.mark.exhaustive
def test_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "distill"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m distill "$@"\n')
    program.chmod(0o755)
    (tmp_path / "runs" / "first").mkdir(parents=True)

    def complete(line: str) -> set[str]:
        script = f'PATH="{tmp_path}:$PATH"; eval "$(distill train -sc install=bash)"; {BASH}'
        run = subprocess.run(
            ["bash", "-c", script, "bash", line], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert not run.stderr
        return set(run.stdout.split())

    assert complete("distill re") == {"resume", "replay", "report"}
    assert complete("distill train model=frcnn_r5") == {
        *("model=frcnn_r50", "model=frcnn_r50_quarter", "model=frcnn_r50_v2")
    }
    assert complete("distill train distill=none schedule.ep") == {"schedule.epochs="}
    assert complete("distill resume ru") == {"runs"}
