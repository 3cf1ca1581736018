"""Curves: which lines are drawn, and where."""

from __future__ import annotations

import math

import numpy as np

from distill.training.curves import draw_curves


def test_lines_without_points_and_diagrams_without_lines_are_left_out() -> None:
    figure = draw_curves({"losses": {"total": [(1.0, 2.0), (2.0, 1.0)], "none": []}, "empty": {"AP": []}})
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "losses"
    assert axes.get_legend_handles_labels()[1] == ["total"]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 2], [2, 1]])


def test_the_vertical_axis_holds_zero_and_epochs_are_whole_numbers() -> None:
    figure = draw_curves({"validation": {"AP": [(1.0, 40.0), (2.0, math.nan), (3.0, 41.0)]}})
    (axes,) = figure.axes
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 41
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_without_values_the_picture_is_empty() -> None:
    assert draw_curves({}).axes == []
