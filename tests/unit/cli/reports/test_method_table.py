"""The table of methods: every option once, with what it compares, whom it fits, its terms and its paper."""

from __future__ import annotations

import pytest

from distill.cli.config import compose
from distill.cli.main import main
from distill.cli.reports.method_table import MethodRow, method_rows
from distill.types import DistillError


@pytest.fixture(scope="module")
def rows() -> dict[str, MethodRow]:
    return {row.option: row for row in method_rows()}


def test_every_option_has_a_row_with_terms_and_a_paper(rows: dict[str, MethodRow]) -> None:
    assert set(rows) == set(compose.config_groups()["distill"]) - {"none"}
    assert [row.option for row in rows.values() if not (row.terms and row.paper and row.pairs and row.idea)] == []


def test_rows_say_what_an_option_compares_and_whom_it_fits(rows: dict[str, MethodRow]) -> None:
    everywhere = ["two-stage", "one-stage", "FCOS", "mixed"]
    assert (rows["pkd"].kinds, rows["pkd"].pairs) == (["features"], everywhere)
    assert (rows["crosskd"].kinds, rows["crosskd"].pairs) == (["outputs"], ["one-stage", "FCOS"])
    assert (rows["defeat_full"].kinds, rows["defeat_full"].pairs) == (["features", "outputs"], ["two-stage"])
    assert rows["dsig_r50_r101"].kinds == ["features", "relations"]
    assert rows["pkd_retinanet"].terms == {"neck.all": 10.0}
    assert rows["pkd_retinanet"].paper == "Cao 2022, arXiv 2207.02039"
    assert rows["dicod"].terms == {"classes": 0.4, "pixels": 0.15, "features": 0.15}


def test_the_command_takes_methods_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "MGD", "cwd_logits"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("mgd_one_stage", "cwd_logits", "neck.all 5e-07", "2205.01529"))
    assert "cwd_all_levels" not in printed
    with pytest.raises(DistillError, match="there is no method 'pdk'; did you mean"):
        list(method_rows(["pdk"]))
