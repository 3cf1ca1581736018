"""Charts of an analysis, drawn by matplotlib: lines, bars, matrices, and maps beside their image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill.evaluation.metric import FloatArray

COLUMNS = 3
"""Diagrams side by side."""
CELL = (4.0, 3.0)
"""Width and height of one diagram, in inches of 100 pixels."""

LEGEND_LINES = 6
"""Largest number of lines whose legend is drawn inside the diagram. Longer legends are drawn beside it."""
LEGEND_WIDTH = 2.4
"""Width of a legend beside a diagram, in inches."""

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name of a line -> its abscissae and ordinates."""
Bars = Mapping[str, Mapping[str, float]]
"""Name of a group -> name of a series -> value. NaN has no bar."""


def literal(text: str) -> str:
    """A class name or another text without the formulas that matplotlib reads between dollar signs."""
    return text.replace("$", r"\$")


def line_charts(diagrams: Mapping[str, Lines], x_label: str, y_label: str, unit: bool = True) -> Figure:
    """Draw one diagram of lines per entry.

    Args:
        diagrams: title -> lines. A line named ``ideal`` is gray and dashed.
        x_label, y_label: names of the axes.
        unit: whether both axes go from 0 to 1.
    """
    is_beside = any(len(lines) > LEGEND_LINES for lines in diagrams.values())
    figure, all_axes = _grid(len(diagrams), CELL[0] + (LEGEND_WIDTH if is_beside else 0.0))
    for axes, (title, lines) in zip(all_axes, diagrams.items(), strict=True):
        for name, (x, y) in lines.items():
            style: dict[str, Any] = {"color": "gray", "linestyle": "--"} if name == "ideal" else {}
            axes.plot(x, y, label=literal(name), marker="." if len(x) == 1 else None, **style)
        axes.set_title(literal(title), loc="left", fontsize="medium")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if unit:
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
        else:
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.4)
        if lines:
            place: dict[str, Any] = {"loc": "best"}
            if len(lines) > LEGEND_LINES:
                place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            axes.legend(**place, frameon=False, fontsize="small")
    return figure


def bar_charts(charts: Mapping[str, Bars], y_label: str, stacked: bool = False) -> Figure:
    """Draw one chart of bars per entry, below each other.

    Args:
        charts: title -> bars.
        y_label: name of the values.
        stacked: whether the series of a group stand on top of each other instead of side by side.
    """
    groups = max((len(bars) for bars in charts.values()), default=1)
    size = (max(7.6, 0.5 * groups), 3.2 * max(1, len(charts)))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    for number, (title, bars) in enumerate(charts.items(), start=1):
        axes = figure.add_subplot(len(charts), 1, number)
        series = list(dict.fromkeys(name for group in bars.values() for name in group))
        places, bottom = np.arange(len(bars)), np.zeros(len(bars))
        width = 0.8 if stacked else 0.8 / max(1, len(series))
        for index, name in enumerate(series):
            values = np.array([group.get(name, math.nan) for group in bars.values()])
            if stacked:
                axes.bar(places, values, width, bottom=bottom, label=name)
                bottom += np.nan_to_num(values)
            else:
                axes.bar(places + (index - (len(series) - 1) / 2) * width, values, width, label=name)
        turned: dict[str, Any] = {"rotation": 90} if len(bars) > 12 else {}
        axes.set_xticks(places, [literal(name) for name in bars], fontsize="small", **turned)
        axes.set_title(literal(title), loc="left", fontsize="medium")
        axes.set_ylabel(y_label)
        axes.grid(axis="y", alpha=0.4)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def matrix_charts(matrices: Mapping[str, FloatArray], rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Draw matrices (R, C) as colored cells, below each other, with their numbers up to 15 rows.

    Args:
        matrices: title -> matrix of shares from 0 to 1.
        rows, columns: names of the rows and columns.
    """
    side = max(4.0, 0.35 * max(len(rows), len(columns)) + 2)
    figure = Figure(figsize=(side + 1, side * max(1, len(matrices))), dpi=100, layout="constrained")
    for number, (title, matrix) in enumerate(matrices.items(), start=1):
        axes = figure.add_subplot(len(matrices), 1, number)
        axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(columns)), [literal(name) for name in columns], rotation=90)
        axes.set_yticks(range(len(rows)), [literal(name) for name in rows])
        axes.set_title(literal(title), loc="left", fontsize="medium")
        axes.set_xlabel("detected")
        axes.set_ylabel("true class")
        if len(rows) <= 15:
            for row, column in np.ndindex(*matrix.shape):
                if matrix[row, column] >= 0.005:
                    color = "black" if matrix[row, column] > 0.6 else "white"
                    text = f"{matrix[row, column]:.2f}"
                    axes.text(column, row, text, ha="center", va="center", color=color, fontsize="small")
    return figure


def map_charts(rows: Sequence[Mapping[str, FloatArray]]) -> Figure:
    """Draw images and maps in rows. The maps of a row share their colors, from its lowest to its highest value.

    Args:
        rows: title -> an image (H, W, 3) uint8, or a map (H, W) that is drawn in colors.
    """
    columns = max((len(row) for row in rows), default=1)
    figure = Figure(figsize=(3.2 * columns, 2.9 * max(1, len(rows))), dpi=100, layout="constrained")
    for place, row in enumerate(rows):
        maps = [values for values in row.values() if values.ndim == 2]
        low, high = min(map(np.min, maps), default=0.0), max(map(np.max, maps), default=1.0)
        for number, (title, values) in enumerate(row.items(), start=1):
            axes = figure.add_subplot(len(rows), columns, place * columns + number)
            axes.imshow(values, vmin=low, vmax=high, cmap="viridis")  # an image has its own colors
            axes.set_title(title, fontsize="small")
            axes.set_axis_off()
    return figure


def _grid(count: int, width: float) -> tuple[Figure, list[Any]]:
    columns = min(COLUMNS, max(1, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(width * columns, CELL[1] * rows), dpi=100, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]
