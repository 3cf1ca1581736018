"""The verb bench: a whole report, as a table and as JSON, for the chosen option or for all that fit."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.cli.config import compose
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL, Cli

LINES = [
    *(
        "bench",
        "--repeats=1",
        "--warmup=1",
        "--batches=2",
        "--images=4",
        "model=frcnn_r10_mini",
        "teacher=frcnn_r18_mini",
    ),
    *(*TINY_DATA, *TINY_MODEL, *TINY_HEADS, "data.workers=0", "trainer.accelerator=cpu"),
]


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, node


def test_the_report_is_complete_and_its_ratios_fit(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "bench.json", tmp_path / "costs.csv"
    table.write_text("distill,pair,ratio,low,high\npkd,FasterRCNN,1.2,1.1,1.3\n")
    assert cli([*LINES, "distill=defeat", "--json", str(file), "--csv", str(table)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert set(report) == {"setting", "student", "options", "skipped", "loader", "evaluation", "verdict"}
    assert report["setting"]["batch"] == [4, 3, 64, 64]
    assert report["setting"]["teacher"] == "untrained"
    (name,) = report["options"]
    assert name == "defeat"
    option = report["options"][name]
    assert option["stages"] == ["neck"]
    for path, value in leaves(report):
        if isinstance(value, (int, float)) and not path.endswith("workers"):
            assert value > 0 or "loss_overhead" in path or "student_recompute" in path, path
    rows = list(csv.DictReader(table.open()))
    assert [row["distill"] for row in rows] == ["pkd", "defeat"]
    assert float(rows[1]["ratio"]) == pytest.approx(option["ratio"]["median"], abs=1e-3)
    own = option["student"]["median"]
    assert option["ratio"]["median"] == pytest.approx(option["step"]["median"] / own)
    parts = own + sum(option[part]["median"] for part in ("teacher", "adapters", "student_recompute"))
    assert option["loss_overhead"]["median"] == pytest.approx(option["step"]["median"] / parts - 1)
    assert report["verdict"]
    for word in ("student alone", "defeat reads", "loader", "evaluation", "verdict", "untrained"):
        assert word in printed


def test_all_options_that_fit_and_why_the_others_do_not(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = compose.config_groups()
    monkeypatch.setattr(
        compose, "config_groups", lambda: {**known, "distill": ["none", "mimic", "dicod", "dsig_retinanet"]}
    )
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "bench.json"
    assert cli([*LINES, "--all", "--json", str(file), "distill=defeat", "distill.losses.defeat.neck.foreground=2"]) == 0
    report = json.loads(file.read_text())
    assert set(report["options"]) == {"mimic"}
    assert report["options"]["mimic"]["allowed"] == 0.1
    assert "classifier.weights" in report["skipped"]["dicod"]
    assert set(report["skipped"]) == {"dicod", "dsig_retinanet"}
    printed = capsys.readouterr().out
    assert "dicod left out" in printed
    assert "…" not in printed.split("reads")[0]  # a terminal of 80 columns cuts neither name nor number


def test_without_distillation_the_student_is_measured_alone(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([*LINES, "distill=none", "teacher=none"]) == 0
    assert "student alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clock=sun"], "expected one of wall, cpu, got 'sun'"),
        (["--repeats=0"], "start at 1"),
        (["distill=dicod"], "classifier.weights"),
        (["modle=x"], "did you mean model"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([*LINES, *words]) == 1
    assert message in capsys.readouterr().err
