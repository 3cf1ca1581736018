"""A picture of a training: losses and AP by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE = (7.6, 3.4)
"""Width and height of one diagram, in inches of 100 pixels."""
DOTS = 50
"""Largest number of points of a line that are marked by dots."""

Line = Sequence[tuple[float, float]]


def draw_curves(diagrams: Mapping[str, Mapping[str, Line]]) -> Figure:
    """Draw diagrams below each other.

    Args:
        diagrams: title -> name of a line -> its points, (x, y) by ascending x. A point that is not finite leaves a gap.
            Lines without points and diagrams without lines are left out.
    """
    kept = {title: {name: line for name, line in lines.items() if line} for title, lines in diagrams.items()}
    kept = {title: lines for title, lines in kept.items() if lines}
    figure = Figure(figsize=(SIZE[0], SIZE[1] * max(1, len(kept))), dpi=100, layout="tight")
    for number, (title, lines) in enumerate(kept.items(), 1):
        axes = figure.add_subplot(len(kept), 1, number, sharex=figure.axes[0] if figure.axes else None)
        for name, line in lines.items():
            x, y = zip(*line, strict=True)
            axes.plot(x, y, label=name, marker="o" if len(line) <= DOTS else None, markersize=4)
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.4)
        axes.legend(loc="best", frameon=False)
    return figure
