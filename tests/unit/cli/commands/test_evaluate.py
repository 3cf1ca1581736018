"""Classes that a model and the data do not share, in the tables of evaluate, train and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli.commands.doctor import _print_teacher
from distill.cli.reports.closing_tables import print_results
from distill.cli.reports.doctor_report import _compare_ap
from distill.cli.runs.recorded_run import class_notes, recompose
from distill.run_folder import RunFolder


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (("cat", "dog"), ("dog", "cat"), []),
        (("cat", "dog", "bus"), ("cat", "lorry", "van"), ["know lorry, van of the data", "the data has no dog, bus"]),
        (("cat",), ("cat", "Cat"), ["know Cat of the data"]),
    ],
)
def test_classes_that_are_not_shared_are_named(
    model: tuple[str, ...], data: tuple[str, ...], expected: list[str]
) -> None:
    notes = class_notes(model, data)
    assert len(notes) == len(expected)
    assert all(words in note for words, note in zip(expected, notes, strict=True))


def test_the_closing_table_has_a_row_for_the_classes_that_the_teacher_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {
        "student": {"val/AP": 0.5},
        "teacher": {"values": {"val/AP": 0.42, "val/shared_AP": 0.63}},
        "parameters": {"student": 1_000_000, "teacher": 2_000_000},
    }
    print_results(summary, RunFolder(tmp_path))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["teacher", "val", "42.0"],
        ["teacher, shared classes", "val", "63.0"],
        ["student", "val", "50.0"],
    ]


@pytest.mark.parametrize(("shared", "noted"), [(0.6, False), (0.45, True)])
def test_the_doctor_compares_a_teacher_by_the_classes_that_it_knows(
    shared: float, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {"images": 8, "values": {"AP": 0.3, "shared_AP": shared}}
    section: dict[str, Any] = {"state": "ready", "source": "t.pt", "promised": 1.0, "here": None, "sample": sample}
    report: dict[str, Any] = {"notes": [], "faults": []}
    _compare_ap(None, section, report)
    assert [
        f"AP of the classes that it knows on 8 validation images is {100 * shared:.1f} %" in n for n in report["notes"]
    ] == ([True] if noted else [])
    _print_teacher(section)
    assert f"AP 30.0 ({100 * shared:.1f} of the classes that it knows) on 8 images" in capsys.readouterr().out


def test_overrides_of_a_training_that_are_refused_now_do_not_stop_an_evaluation(tmp_path: Path) -> None:
    """The keys of 0.1.0 for Lightning's trainer and its CSV logger; the rest of the run's configuration stays."""
    lines = ["seed=3", "+trainer.overfit_batches=2", "+trainer.fast_dev_run=true", "trainer.accelerator=cpu"]
    lines += ["logger.csv.flush_logs_every_n_steps=5", "callbacks.nowhere.every=2", "schedule.epochs=3"]
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(lines))
    cfg = recompose(RunFolder(tmp_path), ["data.batch_size=7"])
    assert (cfg.seed, cfg.schedule.epochs, cfg.data.batch_size, cfg.trainer.accelerator) == (3, 3, 7, "cpu")
    assert "overfit_batches" not in cfg.trainer


def test_other_renames_replace_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(["data=coco", "data.source.rename={Dog: dog}"]))
    cfg = recompose(RunFolder(tmp_path), ["data.source.rename={Cat: cat}", "data.source.classes=[cat,dog]"])
    assert (cfg.data.source.rename, cfg.data.source.classes) == ({"Cat": "cat"}, ["cat", "dog"])
