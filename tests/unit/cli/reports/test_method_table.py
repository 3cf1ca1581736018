"""The table of methods: every option once, with what it compares, whom it fits, its terms and its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.config import compose
from distill.cli.main import main
from distill.cli.reports import method_table
from distill.cli.reports.method_table import (
    MethodRow,
    grouped,
    measured_costs,
    method_rows,
    options_by_place,
    partners,
    refusals,
)
from distill.detectors.registry import FAMILIES
from distill.types import DistillError


@pytest.fixture(scope="module")
def rows() -> dict[str, MethodRow]:
    return {row.option: row for row in method_rows()}


def test_every_option_has_a_row_with_terms_and_a_paper(rows: dict[str, MethodRow]) -> None:
    assert set(rows) == set(compose.config_groups()["distill"]) - {"none"}
    assert [row.option for row in rows.values() if not (row.terms and row.paper and row.pairs and row.idea)] == []


def test_rows_say_what_an_option_compares_and_whom_it_fits(rows: dict[str, MethodRow]) -> None:
    everywhere = list(method_table.PAIRS)
    assert (rows["pkd"].kinds, rows["pkd"].pairs) == (["features"], everywhere)
    assert (rows["crosskd"].kinds, rows["crosskd"].pairs) == (["outputs"], ["one-stage", "FCOS"])
    assert (rows["defeat_full"].kinds, rows["defeat_full"].pairs) == (["features", "outputs"], ["two-stage"])
    assert rows["dsig_r50_r101"].kinds == ["features", "relations"]
    assert rows["pkd_retinanet"].terms == {"neck.all": 10.0}
    assert rows["pkd_retinanet"].paper == "Cao 2022, arXiv 2207.02039"
    assert grouped(rows["pkd"].pairs) == ["all pairs"]
    assert grouped(rows["detr_features"].pairs) == ["queries", "queries as teacher"]
    assert grouped(rows["detr_points"].pairs) == ["RT-DETR", "D-FINE", "DEIMv2"]
    assert grouped(rows["detr_corners"].pairs) == ["D-FINE", "DEIMv2"]
    assert "which has no corner distributions" in rows["detr_corners"].refused["RT-DETR"]
    assert all({*row.pairs, *row.refused} >= set(method_table.PAIRS) for row in rows.values())
    assert rows["dicod"].terms == {"classes": 0.4, "pixels": 0.15, "features": 0.15}


def test_options_of_different_places_may_be_combined(rows: dict[str, MethodRow]) -> None:
    by_place = options_by_place(rows.values())
    assert {"pkd", "defeat_full", "frs"} <= set(by_place["neck"])
    assert {"dist", "defeat_full", "frs"} <= set(by_place["outputs"])
    assert by_place["relations"] == ["best", *(option for option in rows if option.startswith("dsig"))]
    found = partners(rows["pkd"], rows.values())
    assert {"dist", "crosskd", "dsig_r50_r101"} <= set(found)
    assert not {"cwd", "pkd_retinanet", "frs", "dsig"} & set(found)  # on the neck, too
    assert "crosskd" not in partners(rows["chen_hints"], [rows["mimic"]])
    assert partners(rows["mimic"], [rows["crosskd"]]) == []  # no pair of detectors fits both
    assert partners(rows["ld"], [rows["pkd"], rows["dist"], rows["mimic"]]) == ["pkd"]


def test_an_option_may_compose_several_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = tmp_path / "distill" / "both.yaml"
    option.parent.mkdir()
    lines = "".join(f"  - {name}@_global_.distill.losses.{name}\n" for name in ("pkd", "dist"))
    option.write_text(f"# @package distill\ndefaults:\n{lines}  - _self_\nbalance: gradient\n")
    monkeypatch.setattr(compose, "all_folders", lambda: [compose.config_folder(), tmp_path])
    monkeypatch.setattr(compose, "config_groups", lambda: {"distill": ["both", "none", "pkd"]})
    (row,) = method_rows(["both"])
    assert (row.name, row.places) == ("PKD + DIST", ["neck", "outputs"])
    assert grouped(row.pairs) == ["two-stage", "one-stage", "FCOS", "queries"]
    assert row.terms == {"pkd/neck.all": 6.0, "dist/classes.inter": 1.0, "dist/classes.intra": 1.0}


def test_costs_are_read_from_the_file_of_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "config_folder", lambda: tmp_path)
    assert measured_costs() == {}
    (tmp_path / method_table.COSTS).write_text(
        "# one thread\ndistill,pair,ratio,low,high\npkd,FasterRCNN,1.25,1.2,1.3\n"
    )
    assert measured_costs() == {"pkd": 1.25}


def test_the_command_takes_methods_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "MGD", "cwd_logits"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("mgd_one_stage", "cwd_logits", "neck.all 5e-07", "2205.01529"))
    assert "cwd_all_levels" not in printed
    with pytest.raises(DistillError, match="there is no method 'pdk'; did you mean"):
        list(method_rows(["pdk"]))


def test_pairs_that_are_refused_for_one_reason_are_named_together(rows: dict[str, MethodRow]) -> None:
    found = refusals(rows["chen"])
    assert list(found) == ["one-stage, mixed", "FCOS", "queries, queries as student", "queries as teacher"]
    assert found["queries as teacher"].startswith("rpn: the teacher is a detector with queries, which has no objectn")
    points = refusals(rows["detr_points"])["RF-DETR, RF-DETR as student"]
    assert points.startswith("points: the student is a rfdetr, which has no query_points.")
    assert "whose queries start from any points" in points


def test_every_family_with_queries_is_in_the_table() -> None:
    assert set(method_table.QUERY_NAMES) == {
        name for name, family in FAMILIES.items() if "queries" in family.view_class.outputs
    }


@pytest.mark.parametrize("family", method_table.QUERY_NAMES)
def test_the_specs_of_detectors_with_queries_are_those_of_the_detectors(family: str) -> None:
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    build: Any = FAMILIES[family]
    with torch.device("meta"):
        real = build(["a", "b"]).spec
    declared = method_table.query_spec(family)
    assert declared.outputs == real.outputs
    assert list(declared.neck) == list(real.neck)
    assert list(declared.body) == list(real.body)
    assert declared.corner_bins == real.corner_bins
    assert (declared.anchors, declared.side_bins) == (real.anchors, real.side_bins)
