"""Everything that is measured on the detections of each model, and the tables of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill.analysis.agreement import Agreement, ToDo, agreement, to_do_list
from distill.analysis.calibration import BINS, Calibration, calibration
from distill.analysis.errors import KINDS, ClassShares, ErrorBreakdown, break_down, hoiem_shares
from distill.analysis.thresholds import NONE, Curve, confident, confusion_matrix, threshold_curves
from distill.evaluation.metric import DetectionArrays, GroundTruth, IntArray

Rows = list[dict[str, object]]
CURVE_POINTS = 1000
"""Largest number of points of a curve in a file."""
TEACHER, STUDENT = "teacher", "student"


class ModelReport(NamedTuple):
    """Results of one model."""

    errors: ErrorBreakdown
    shares: dict[str, ClassShares]
    curves: dict[str, Curve]
    confident: DetectionArrays
    """Detections with at least the best threshold of their class."""
    confusion: IntArray
    """(K + 1, K + 1) of the confident detections."""
    calibration: Calibration


class Comparison(NamedTuple):
    """Results of all models, by name. The teacher, if any, is named `TEACHER`."""

    classes: Sequence[str]
    models: dict[str, ModelReport]
    agreements: dict[str, Agreement]
    """Name of a model that is not the teacher -> its agreement with the teacher. Empty without a teacher."""
    to_do: list[ToDo]
    """Images with errors of the student that the teacher does not make. Empty without a teacher."""


def report_model(
    truth: GroundTruth, detections: DetectionArrays, classes: Sequence[str], groups: Sequence[Sequence[str]]
) -> ModelReport:
    """Measure one model. `groups` are groups of similar classes, see `errors.hoiem_shares`."""
    curves = threshold_curves(truth, detections, classes)
    sure = confident(detections, curves, classes)
    return ModelReport(
        break_down(truth, detections, len(classes)),
        hoiem_shares(truth, detections, classes, groups),
        curves,
        sure,
        confusion_matrix(truth, sure, len(classes)),
        calibration(truth, detections, len(classes)),
    )


def compare_models(
    truth: GroundTruth,
    detections: Mapping[str, DetectionArrays],
    classes: Sequence[str],
    groups: Sequence[Sequence[str]] = (),
) -> Comparison:
    """Measure all models, and compare them with the teacher.

    Args:
        truth: the ground truth.
        detections: name of a model -> its detections; `STUDENT`, and perhaps `TEACHER` and others.
        classes: the K class names.
        groups: groups of similar classes.
    """
    models = {name: report_model(truth, found, classes, groups) for name, found in detections.items()}
    if TEACHER not in models:
        return Comparison(classes, models, {}, [])
    teacher = models[TEACHER].confident
    agreements = {name: agreement(truth, teacher, model.confident) for name, model in models.items() if name != TEACHER}
    return Comparison(classes, models, agreements, to_do_list(truth, teacher, models[STUDENT].confident))


def model_tables(result: Comparison) -> dict[str, Rows]:
    """Name of a table -> its rows. Shares and metrics go from 0 to 1; -1 is a value that does not exist."""
    tables: dict[str, Rows] = {
        name: [] for name in ("errors", "shares", "thresholds", "curves", "confusion", "calibration", "agreement")
    }
    for name, model in result.models.items():
        tables["errors"] += [
            {"model": name, "kind": kind, "ap50_gain": model.errors.gain[kind], "count": model.errors.counts[kind]}
            for kind in KINDS
        ]
        tables["shares"] += [
            {"model": name, "class": label, "detections": shares.detections, **shares.counts}
            for label, shares in model.shares.items()
        ]
        tables["thresholds"] += [
            {"model": name, "class": label, **threshold_row(curve)} for label, curve in model.curves.items()
        ]
        tables["curves"] += [
            {"model": name, "class": label, **point}
            for label, curve in model.curves.items()
            for point in curve_points(curve)
        ]
        tables["confusion"] += _confusion_rows(name, model.confusion, result.classes)
        tables["calibration"] += _calibration_rows(name, model.calibration, result.classes)
    tables["agreement"] = [{"model": name, **one._asdict()} for name, one in result.agreements.items()]
    return {name: rows for name, rows in tables.items() if rows}


def threshold_row(curve: Curve) -> dict[str, object]:
    """The point of the best F1. Its values are empty for a class without a true positive."""
    if curve.best is None:
        return {"objects": curve.objects, "threshold": "", "f1": "", "precision": "", "recall": ""}
    values = {"f1": curve.f1, "precision": curve.precision, "recall": curve.recall}
    point = {key: float(column[curve.best]) for key, column in values.items()}
    return {"objects": curve.objects, "threshold": curve.threshold, **point}


def curve_points(curve: Curve, most: int = CURVE_POINTS) -> list[dict[str, float]]:
    """Points of a curve by descending score, at most `most`, evenly spread over its detections."""
    count = len(curve.score)
    chosen = np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(int)).tolist()
    columns = {"score": curve.score, "precision": curve.precision, "recall": curve.recall, "f1": curve.f1}
    return [{key: float(column[index]) for key, column in columns.items()} for index in chosen]


def _confusion_rows(model: str, counts: IntArray, classes: Sequence[str]) -> Rows:
    names = [*classes, NONE]
    return [
        {"model": model, "true": names[row], "detected": names[column], "count": int(counts[row, column])}
        for row, column in zip(*np.nonzero(counts), strict=True)
    ]


def _calibration_rows(model: str, result: Calibration, classes: Sequence[str]) -> Rows:
    return [
        {
            "model": model,
            "class": label,
            "from": index / BINS,
            "to": (index + 1) / BINS,
            "detections": int(part.counts[index]),
            "score": float(part.score[index]),
            "precision": float(part.precision[index]),
            "iou": float(part.iou[index]),
        }
        for label, part in zip(["all classes", *classes], [result.all, *result.by_class], strict=True)
        for index in range(BINS)
        if part.counts[index]
    ]


def model_summary(result: Comparison) -> dict[str, object]:
    """The main numbers for a JSON file. Values from 0 to 1; None is a value that does not exist."""
    summary: dict[str, object] = {
        "errors": {
            name: {"ap50": model.errors.ap50, "ap50_gain": model.errors.gain, "count": model.errors.counts}
            for name, model in result.models.items()
        },
        "thresholds": {
            name: {
                label: {key: None if value == "" else value for key, value in threshold_row(curve).items()}
                for label, curve in model.curves.items()
            }
            for name, model in result.models.items()
        },
        "calibration": {
            name: {"d_ece": model.calibration.d_ece, "la_ece": model.calibration.la_ece}
            for name, model in result.models.items()
        },
        "agreement": {name: one._asdict() for name, one in result.agreements.items()},
    }
    return summary
