"""Names of W&B runs and groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.training.wandb_run import WandbRun, run_id, shorten


def test_a_long_group_is_cut_and_stays_different() -> None:
    long = "distill.losses.defeat.neck.foreground=4 " * 10
    first, second = shorten(long + "a"), shorten(long + "b")
    assert first != second
    assert len(first) == len(second) == 128
    assert shorten("defaults") == "defaults"


def test_a_folder_has_one_id_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_id("run") == run_id(tmp_path / "run") != run_id("other")


def test_tags_without_a_value_are_left_out(tmp_path: Path) -> None:
    run = WandbRun(tmp_path, tags=["defeat", None, ""], offline=True)
    assert run._wandb_init["tags"] == ["defeat"]
