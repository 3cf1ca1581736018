"""Descriptions of detectors in older and newer formats."""

from __future__ import annotations

from typing import Any

import pytest

from distill.detectors.description import FORMAT, checkpoint_model, to_current_format
from distill.types import DistillError
from helpers.old_run_folders import record


@pytest.mark.parametrize(("norm", "today"), [("live", "batch"), ("fixed", "batch_fixed_stats"), ("sync", "sync")])
def test_format_1_gets_the_norms_of_today(norm: str, today: str) -> None:
    old = {"format": 1, "model": {"family": "fcos", "norm": norm, "neck_channels": 64}, "extra": {"a": 1}}
    new = to_current_format(old, "student.json")
    model = {"family": "fcos", "backbone": {"norm": today}, "neck_channels": 64}
    assert new == {"format": 2, "model": model, "extra": {"a": 1}}
    assert to_current_format(new, "student.json") == new


def test_a_checkpoint_holds_the_same_description() -> None:
    old = record("fcos")
    expected = to_current_format(old["student_json"], "student.json")["model"]
    assert checkpoint_model(old["checkpoint"], "last.ckpt") == expected
    assert checkpoint_model({"student": expected, "student_format": FORMAT}, "last.ckpt") == expected


@pytest.mark.parametrize("written", [FORMAT + 1, 0, "2", True, None, [1]])
def test_an_unknown_format_is_refused(written: Any) -> None:
    with pytest.raises(
        DistillError, match=r"run/student\.json: the detector's description has format .*install the version"
    ):
        to_current_format({"format": written, "model": {}}, "run/student.json")
    with pytest.raises(DistillError, match=r"last\.ckpt: the detector's description has format"):
        checkpoint_model({"student": {}, "student_format": written}, "last.ckpt")
