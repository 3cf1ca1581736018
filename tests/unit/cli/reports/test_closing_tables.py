"""The closing comparison: student alone, distilled student and teacher, with what the distillation gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.cli.reports.closing_tables import describe_gain, print_comparison
from distill.cli.runs.related_runs import RelatedRun
from distill.diagnostics.cost import Cost, ModelRow

COST = Cost(10.0, 100.0, 1.5, 4.0, 1_000_000, 5, "a processor")
BIG = Cost(50.0, 20.0, 9.5, 16.0, 4_000_000, 5, "a processor")
ALONE = {"student": {"val/AP": 0.1, "test/AP": 0.12}, "teacher": None, "losses": []}
DISTILLED = {
    "student": {"val/AP": 0.3, "test/AP": 0.32},
    "teacher": {"values": {"val/AP": 0.5, "test/AP": 0.52}},
    "losses": ["defeat"],
    "cost": {"teacher": vars(BIG)},
}


def printed(
    summary: dict[str, Any], related: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> tuple[list[list[str]], str]:
    """Cells of the table's rows, and all that is printed."""
    name = "distilled (defeat)" if summary["losses"] else "student alone"
    rows = {"student": ModelRow(name, summary["student"], COST)}
    if summary["teacher"]:
        rows["teacher"] = ModelRow("teacher", summary["teacher"]["values"], BIG)
    runs = [RelatedRun(Path("run"), other) for other in related]
    print_comparison(summary, rows, runs, "python -m distill train 'a=b c' distill=none")
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    return [line for line in lines if line and line[0] in ("student", "distilled", "teacher")], text


def test_the_table_has_the_student_alone_the_distilled_one_and_the_teacher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    older = {**ALONE, "student": {"val/AP": 0.0, "test/AP": 0.0}}
    unmeasured = {**ALONE, "student": {"val/AP": 0.2}}  # a run with test=false
    rows, text = printed(DISTILLED, [unmeasured, ALONE, older], capsys)
    assert rows == [
        ["student", "alone", "12.0", "10", "100", "1.5", "4", "1"],
        ["distilled", "(defeat)", "32.0", "10", "100", "1.5", "4", "1"],
        ["teacher", "52.0", "50", "20", "9.5", "16", "4"],
    ]
    assert "+20.0 AP over the student alone: 50 % of the gap of 40.0 to the teacher" in text


def test_a_baseline_s_table_has_the_distilled_runs_of_the_same_student(capsys: pytest.CaptureFixture[str]) -> None:
    rows, text = printed(ALONE, [DISTILLED], capsys)
    assert [row[0] for row in rows] == ["student", "distilled", "teacher"]
    assert rows[2][1:3] == ["52.0", "50"]
    assert "distilled (defeat): +20.0 AP" in text


def test_without_a_baseline_the_command_that_makes_one_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    rows, text = printed(DISTILLED, [], capsys)
    assert [row[0] for row in rows] == ["distilled", "teacher"]
    assert "\npython -m distill train 'a=b c' distill=none\n" in text


@pytest.mark.parametrize(
    ("alone", "distilled", "teacher", "text"),
    [
        (0.1, 0.3, None, "+20.0 AP over the student alone"),
        (0.1, 0.09999, None, "+0.0 AP over"),
        (0.1, 0.05, 0.2, "-5.0 AP over the student alone: -50 % of the gap of 10.0 to the teacher"),
        (0.3, 0.4, 0.2, "+10.0 AP over the student alone; the teacher (20.0) is not better than the student alone"),
    ],
)
def test_the_gain_and_its_share_of_the_gap(alone: float, distilled: float, teacher: float | None, text: str) -> None:
    assert describe_gain(alone, distilled, teacher).startswith(text)


@pytest.mark.parametrize(("teacher", "warned"), [(0.003, True), (0.32, True), (0.33, False)])
def test_a_teacher_that_is_not_better_than_its_student(
    teacher: float, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a baseline, too: a teacher of 0.3 AP once taught a student of 17.7 without a word."""
    weak = {**DISTILLED, "teacher": {"values": {"val/AP": 0.0, "test/AP": teacher}}}
    _, text = printed(weak, [], capsys)
    assert ("is not better than its student (32.0)" in " ".join(text.split())) == warned


def test_the_length_of_both_trainings_and_the_images_of_both_models_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text('{"student": {}, "images": 1600}')
    taught = {**DISTILLED["teacher"], "source": str(tmp_path)}
    one = {**DISTILLED, "teacher": taught, "images": 100, "training": {"epochs": 8, "seconds": 61.0}}
    _, text = printed(one, [{**ALONE, "training": {"epochs": 12, "seconds": 70.0}}], capsys)
    assert "for 1 min 10 s (epochs: 12) alone, for 1 min 1 s (epochs: 8) with distillation" in text
    assert "the student learned from 100, the teacher from 1600" in text
