"""Charts with any class names."""

from __future__ import annotations

import io

import numpy as np
import pytest

from distill.analysis.charts import bar_charts, line_charts, matrix_charts

NAMES = ("$^$", "5$ bill")


@pytest.mark.parametrize("kind", ["matrix", "bars", "lines"])
def test_a_dollar_sign_begins_no_formula(kind: str) -> None:
    """matplotlib cannot read ``$^$`` as a formula."""
    if kind == "matrix":
        figure = matrix_charts({NAMES[0]: np.eye(2)}, NAMES, NAMES)
    elif kind == "bars":
        figure = bar_charts({NAMES[0]: {name: {"share": 0.5} for name in NAMES}}, "share")
    else:
        figure = line_charts({NAMES[0]: {name: ([0.0, 1.0], [0.0, 1.0]) for name in NAMES}}, "score", "share")
    figure.savefig(io.BytesIO(), format="png")
    assert figure.axes[0].get_title(loc="left") == r"\$^\$"


@pytest.mark.parametrize("count", [3, 12])
def test_many_names_do_not_cover_the_lines(count: int) -> None:
    """A detector and a method together have ten terms and more."""
    figure = line_charts({"terms": {f"dsig/term.{n}": ([0, 1], [n, n]) for n in range(count)}}, "step", "share", False)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names, diagram = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert names.x1 <= figure.bbox.x1
    assert diagram.width > 250
    assert bool(names.x0 >= diagram.x1) is (count > 6)
