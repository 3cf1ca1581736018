"""The tables of an analysis, and the detections that its pictures show."""

from __future__ import annotations

import numpy as np
import pytest

from distill.analysis.model_report import compare_models, curve_points, model_summary, model_tables
from distill.analysis.thresholds import Curve
from distill.analysis.to_do_pictures import detections_of
from helpers.detection_cases import arrays, random_case

CLASSES = ("cat", "dog", "owl")


def test_tables_add_up() -> None:
    truth, student = random_case(0, CLASSES)
    teacher = student._replace(score=1 - student.score)
    result = compare_models(truth, {"teacher": teacher, "student": student}, CLASSES)
    tables, summary = model_tables(result), model_summary(result)
    assert set(tables) == {"errors", "shares", "thresholds", "curves", "confusion", "calibration", "agreement"}
    for name in ("teacher", "student"):
        own = {key: [row for row in rows if row["model"] == name] for key, rows in tables.items()}
        counts = {row["class"]: row["objects"] for row in own["thresholds"]}
        assert counts["all classes"] == sum(counts[label] for label in CLASSES)
        # every object has a row of the confusion matrix
        found = [row["count"] for row in own["confusion"] if row["true"] != "background"]
        assert sum(found) == counts["all classes"]
        sizes = {
            label: sum(row["detections"] for row in own["calibration"] if row["class"] == label) for label in counts
        }
        assert sizes["all classes"] == sum(sizes[label] for label in CLASSES)
        assert sizes["all classes"] == len([row for row in own["curves"] if row["class"] == "all classes"])
    assert [row["model"] for row in tables["agreement"]] == ["student"]
    assert summary["agreement"]["student"]["boxes"] == len(result.models["teacher"].confident.score)


def test_without_a_teacher_there_is_no_agreement() -> None:
    truth, student = random_case(0, CLASSES)
    result = compare_models(truth, {"student": student}, CLASSES)
    assert "agreement" not in model_tables(result)
    assert result.to_do == []


@pytest.mark.parametrize(("count", "most", "expected"), [(5, 10, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (0, 3, [])])
def test_long_curves_are_thinned(count: int, most: int, expected: list[int]) -> None:
    values = np.arange(count, dtype=np.float64)
    points = curve_points(Curve(1, values, values, values, values), most)
    assert [point["score"] for point in points] == expected


def test_boxes_move_with_the_resize() -> None:
    found = arrays(
        CLASSES, [1, 2], [], [(1, 1, (0, 0, 9, 9), 0.5), (2, 2, (10, 20, 30, 40), 0.4), (2, 3, (0, 0, 4, 8), 0.9)]
    )[1]
    drawn = detections_of(found, 2, original=(100, 200), resized=(50, 50))
    assert drawn.boxes.tolist() == [[0, 0, 1, 4], [2.5, 10, 7.5, 20]]
    assert drawn.labels.tolist() == [3, 2]
    assert drawn.scores.tolist() == pytest.approx([0.9, 0.4])
