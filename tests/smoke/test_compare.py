"""Comparisons of runs that are really trained, each of two steps."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from markupsafe import escape

from distill.cli.config import prepared_sweeps
from helpers.grids import mostly_exhaustive
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL, TINY_RUN, Cli


def rows(folder: Path) -> dict[str, dict[str, str]]:
    return {row["configuration"]: row for row in csv.DictReader((folder / "comparison.csv").open())}


@pytest.mark.parametrize("name", mostly_exhaustive(prepared_sweeps.sweep_names(), ["defeat_table6"]))
def test_a_table_of_the_paper_is_one_command(
    name: str, cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval over images comes from the detections of the runs, and holds the difference of both summaries."""
    lines = [*TINY_DATA, *TINY_MODEL, *TINY_RUN, "pictures=0", "test=false", f"sweep={name}", "seeds=1"]
    if "retinanet" in name:
        lines = ["model=retinanet_r10_quarter", "teacher=frcnn_r18_mini", *lines]
    else:
        lines += TINY_HEADS
    assert cli(["compare", *lines, f"teacher.weights={tiny_teacher}", "hydra.sweep.dir=sweep"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "of one seed (0), so there is no interval over seeds" in said
    found = rows(tmp_path / "sweep")
    assert list(found) == ["teacher", *prepared_sweeps.read_sweep(name)]
    page = (tmp_path / "sweep" / "comparison.html").read_text(encoding="utf-8")
    assert "data:image/png" in page
    assert all(f"<td>{escape(label)}</td>" in page for label in found)
    content = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    values = {run["configuration"]: run["val/AP"] for run in content["runs"]}
    assert not content["left_out"]
    for label in list(found)[2:]:
        row = found[label]
        assert float(row["difference"]) == pytest.approx(values[label] - values["student alone"], abs=1e-9)
        assert float(row["images_low"]) <= float(row["images_high"])
        assert row["verdict"] == "not decided"
        assert float(row["seconds_per_step"]) > 0
        # The group has all words that change the training, as on W&B, and no seed.
        assert f"teacher.weights={tiny_teacher}" in row["group"]
        assert "seed=" not in row["group"]
