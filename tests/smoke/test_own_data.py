"""A data set named by its folder trains, and its run is evaluated from another folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from helpers.grids import mostly_exhaustive
from helpers.image_folders import write_coco, write_voc, write_yolo
from helpers.runs import TINY, Cli, summary

WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": write_coco,
    "voc": partial(write_voc, lists={"train": ("train", 8), "val": ("val", 4)}),
    "yolo": write_yolo,
}
OWN = [line for line in TINY if not line.startswith("data.source")]


@pytest.mark.parametrize("layout", mostly_exhaustive(WRITERS, ["yolo"]))
def test_a_folder_trains_and_is_evaluated_from_elsewhere(
    layout: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[layout](tmp_path / "my data")
    assert cli(["train", "data=my data", "distill=none", *OWN, "hydra.run.dir=run"]) == 0
    before = summary(tmp_path / "run")["student"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli(["evaluate", "../run", "--json", "numbers.json"]) == 0
    assert f'"AP": {before["val/AP"]}' in (tmp_path / "elsewhere" / "numbers.json").read_text()
