"""The checks of a finished run before it is analyzed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill import __version__
from distill.cli.analyzed_models import read_finished, same_split
from distill.run_folder import RunFolder
from distill.types import DistillError


def write(folder: Path, summary: Any, *files: str) -> RunFolder:
    run = RunFolder(folder)
    if summary is not None:
        run.summary.write_text(json.dumps(summary))
    for name in files:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return run


EXPORTED = ("student.pt", "student.json")
CASES = [
    (None, EXPORTED, r"has not finished, it has no summary\.json: start it again"),
    (None, (*EXPORTED, "checkpoints/last.ckpt"), "has no summary.json: python -m distill resume .* continues it"),
    ({"student": {}}, ("student.json",), r"there is no student\.pt"),
    ({"losses": []}, EXPORTED, "expected the run's results under 'student'"),
    ({"student": {}, "versions": {"distill": "99.1"}}, EXPORTED, "written by distill 99.1, newer than the installed"),
]


@pytest.mark.parametrize(("summary", "files", "message"), CASES)
def test_refused_runs(summary: Any, files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=message):
        read_finished(write(tmp_path, summary, *files))


@pytest.mark.parametrize("versions", [None, {}, {"distill": "0.1.0"}, {"distill": __version__}, {"distill": "mine"}])
def test_runs_of_older_versions_are_read(versions: Any, tmp_path: Path) -> None:
    summary = {"student": {"val/AP": 0.5}, "versions": versions}
    assert read_finished(write(tmp_path, summary, *EXPORTED)) == summary


def test_whether_a_split_is_the_same() -> None:
    summary = {"measured": {"data": {"val": "a"}}}
    assert same_split(summary, "val", "a") is True
    assert same_split(summary, "val", "b") is False
    assert same_split(summary, "test", "a") is None
    assert same_split({}, "val", "a") is None
