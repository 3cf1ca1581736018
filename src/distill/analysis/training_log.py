"""Loss terms and their gradients over a training, from the run's CSV files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from distill.analysis.charts import Lines
from distill.run_folder import RunFolder
from distill.training.callbacks.history import read_rows

Row = Mapping[str, str]


def loss_lines(rows: Sequence[Row]) -> dict[str, Lines]:
    """Loss -> weighted terms by epoch: figures 5 and 6 of DeFeat (arXiv 2103.14475) for the terms of the run.

    Args:
        rows: of ``metrics.csv``. The losses are ``student``, the detector's own, and those of the distillation.
    """
    diagrams: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for column in _columns(rows, "loss/"):
        loss, _, term = column.removeprefix("loss/").partition("/")
        if term:  # loss/total and other sums are in curves.png
            diagrams.setdefault(loss, {})[term] = _line(rows, "epoch", column)
    return {loss: lines for loss, lines in diagrams.items() if any(x for x, _ in lines.values())}


def gradient_lines(rows: Sequence[Row]) -> Lines:
    """Term -> its share of the gradient at the student's neck by step, from the rows of ``steps.csv``."""
    lines = {column.removeprefix("gradient/"): _line(rows, "step", column) for column in _columns(rows, "gradient/")}
    return {term: line for term, line in lines.items() if line[0]}


def read_training(run: RunFolder) -> tuple[dict[str, Lines], Lines]:
    """`loss_lines` and `gradient_lines` of a run. Both are empty without the files."""
    epochs, steps = (read_rows(file) if file.is_file() else [] for file in (run.metrics, run.steps))
    return loss_lines(epochs), gradient_lines(steps)


def _columns(rows: Sequence[Row], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name and name.startswith(prefix)))


def _line(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """The points where both columns have a finite number."""
    points = [(_number(row.get(x)), _number(row.get(y))) for row in rows]
    kept = [point for point in points if all(map(math.isfinite, point))]
    return [point[0] for point in kept], [point[1] for point in kept]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
