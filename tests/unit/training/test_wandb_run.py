"""Names of W&B runs and groups."""

from __future__ import annotations

from pathlib import Path

from distill.training.wandb_run import WandbRun, _typed, shorten


def test_a_long_group_is_cut_and_stays_different() -> None:
    long = "distill.losses.defeat.neck.foreground=4 " * 10
    first, second = shorten(long + "a"), shorten(long + "b")
    assert first != second
    assert len(first) == len(second) == 128
    assert shorten("defaults") == "defaults"


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    ids = []
    for resumed in (False, True, False, True):
        run = WandbRun(tmp_path, offline=True)
        run.choose_id(resumed)
        ids.append(run._wandb_init["id"])
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_a_resumed_run_without_an_id_gets_one(tmp_path: Path) -> None:
    """The training was without W&B before it was stopped."""
    run = WandbRun(tmp_path, offline=True)
    run.choose_id(resumed=True)
    assert run.version


def test_tags_without_a_value_are_left_out(tmp_path: Path) -> None:
    run = WandbRun(tmp_path, tags=["defeat", None, ""], offline=True)
    assert run._wandb_init["tags"] == ["defeat"]


def test_columns_of_numbers_are_numbers_and_names_that_look_like_numbers_stay_texts() -> None:
    columns = ["class", "objects", "score", "file"]
    rows = [["all classes", "9", "", "x"], ["1", "4", "0.5", "000139"], ["nan", "5", "1e-3", "7"]]
    assert _typed(columns, rows) == [
        ["all classes", 9.0, None, "x"],
        ["1", 4.0, 0.5, "000139"],
        ["nan", 5.0, 0.001, "7"],
    ]
    assert _typed(columns, []) == []
