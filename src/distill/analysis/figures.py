"""The figures of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from distill.analysis.charts import Lines, bar_charts, line_charts, literal, map_charts, matrix_charts
from distill.analysis.comparison import Difference
from distill.analysis.feature_maps import PARTS
from distill.analysis.model_report import Comparison, ModelReport
from distill.analysis.neck_report import NeckReport
from distill.analysis.thresholds import ALL, NONE, Curve
from distill.evaluation.metric import FloatArray

MOST_CLASSES = 20
"""Classes in a chart, those with the most objects; the files have all."""
MOST_DIAGRAMS = 12
LABEL_WIDTH = 40
"""Characters of a line in the name of a configuration."""


def model_figures(result: Comparison) -> dict[str, Figure]:
    """Name -> figure of what was measured on the detections."""
    models = result.models
    first = next(iter(models.values()))
    names = sorted(first.shares, key=lambda name: -first.curves[name].objects)
    gains = {kind: {name: model.errors.gain[kind] for name, model in models.items()} for kind in first.errors.gain}
    figures = {
        "errors": bar_charts({"AP50 that is gained without one kind of error": gains}, "AP50"),
        "shares": bar_charts(
            {f"{name}: the best detections of each class": _shares(model, names) for name, model in models.items()},
            "share",
            stacked=True,
        ),
        "confusion": matrix_charts(
            {f"{name}, share of each row": _row_shares(model) for name, model in models.items()},
            [*result.classes, NONE],
            [*result.classes, NONE],
        ),
        "calibration": line_charts({"reliability, all classes": _reliability(models)}, "score", "precision"),
    }
    shown = [ALL, *names[: MOST_DIAGRAMS - 1]]
    for figure, x_label, x_key, y_key in (
        ("precision_recall", "recall", "recall", "precision"),
        ("f1", "score", "score", "f1"),
    ):
        diagrams = {
            label: {name: _line(model.curves[label], x_key, y_key) for name, model in models.items()} for label in shown
        }
        figures[figure] = line_charts(diagrams, x_label, y_key)
    if result.agreements:
        columns = {
            "teacher's\nboxes found": "found",
            "its right\nboxes found": "right_found",
            "its mistakes\ncopied": "copied",
            "its missed\nobjects missed": "missed_too",
        }
        bars = {
            title: {name: one._asdict()[key] for name, one in result.agreements.items()}
            for title, key in columns.items()
        }
        known = {title: {name: v if v >= 0 else np.nan for name, v in row.items()} for title, row in bars.items()}
        figures["agreement"] = bar_charts({"agreement with the teacher": known}, "share")
    return figures


def _shares(model: ModelReport, names: list[str]) -> dict[str, dict[str, float]]:
    return {
        name: {kind: count / max(1, model.shares[name].detections) for kind, count in model.shares[name].counts.items()}
        for name in names[:MOST_CLASSES]
    }


def _row_shares(model: ModelReport) -> FloatArray:
    counts = model.confusion.astype(np.float64)
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _reliability(models: dict[str, ModelReport]) -> Lines:
    lines: dict[str, tuple[list[float], list[float]]] = {"ideal": ([0.0, 1.0], [0.0, 1.0])}
    for name, model in models.items():
        part = model.calibration.all
        seen = part.counts > 0
        lines[f"{name}, D-ECE {100 * model.calibration.d_ece:.1f} %"] = (
            part.score[seen].tolist(),
            part.precision[seen].tolist(),
        )
    return lines


def _line(curve: Curve, x: str, y: str) -> tuple[list[float], list[float]]:
    columns = curve._asdict()
    return columns[x].tolist(), columns[y].tolist()


def neck_figures(report: NeckReport) -> dict[str, Figure]:
    """Name -> figure of what was measured in the necks."""
    figures: dict[str, Figure] = {}
    for name, levels_of, label in (
        ("gradients", report.gradients, "mean gradient of the detection loss"),
        ("ssim", report.ssim, "SSIM with the teacher"),
        ("cka", report.cka, "linear CKA with the teacher"),
    ):
        if levels_of:
            charts = {
                model: {
                    f"stride {stride}": dict(zip((*PARTS, "all"), means, strict=False))
                    for stride, means in levels.items()
                }
                for model, levels in levels_of.items()
            }
            figures[name] = bar_charts(charts, label)
    if report.distances:
        diagrams: dict[str, Lines] = {}
        for row, part in enumerate(PARTS):
            lines = {}
            for model, maps in report.distances.items():
                values = next(iter(maps.values()))[row].tolist()
                lines[model] = (list(range(len(values))), values)
            stride = next(iter(next(iter(report.distances.values()))))
            diagrams[f"{part} of objects, stride {stride}"] = lines
        figures["distances"] = line_charts(diagrams, "channel", "mean |student - teacher|", unit=False)
    for name in ("gradients", "ssim", "edges"):
        rows: list[dict[str, Any]] = []
        for example in report.examples:
            tensors: dict[str, Tensor] = getattr(example, name)
            picture = {f"image {example.image_id}": example.image.permute(1, 2, 0).numpy()}
            if tensors:
                rows.append({**picture, **{model: values.numpy() for model, values in tensors.items()}})
        if rows:
            figures[f"{name}_examples"] = map_charts(rows)
    return figures


def training_figures(losses: Mapping[str, Lines], gradients: Lines) -> dict[str, Figure]:
    """Name -> figure of the loss terms over the training, see `training_log`."""
    figures: dict[str, Figure] = {}
    if losses:
        figures["terms"] = line_charts(losses, "epoch", "weighted term", unit=False)
    if gradients:
        title = "share of the gradient at the neck"
        figures["gradient_shares"] = line_charts({title: gradients}, "step", "share", unit=False)
    return figures


def difference_figure(differences: Mapping[str, Difference], metric: str) -> Figure:
    """Points and intervals of the differences to the student alone, one row per configuration, in percentage points."""
    names = [fill(literal(name), LABEL_WIDTH) for name in differences]
    lines = sum(1 + name.count("\n") for name in names)
    figure = Figure(figsize=(7.6, 1.4 + 0.3 * len(names) + 0.2 * lines), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="gray", linewidth=1)
    for place, difference in enumerate(differences.values()):
        if difference.by_seed is not None:
            axes.plot(
                [100 * difference.by_seed.low, 100 * difference.by_seed.high],
                [place, place],
                color="C0",
                linewidth=3,
                alpha=0.5,
            )
        axes.plot([100 * difference.mean], [place], "o", color="C0")
        text = f"{100 * difference.mean:+.1f}"
        axes.annotate(text, (100 * difference.mean, place), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first configuration on top
    axes.set_xlabel(f"difference in {metric} to the reference, percentage points; bar: 95 % interval over seeds")
    axes.grid(alpha=0.4, axis="x")
    return figure
