"""Calibration errors on cases computed by hand, and against a slow loop over bins."""

from __future__ import annotations

import numpy as np
import pytest

from distill.analysis.calibration import BINS, calibration
from distill.evaluation.matching import match
from helpers.detection_cases import arrays, random_case

CLASSES = ("cat", "dog", "owl")
A, B, C = (0, 0, 10, 10), (50, 0, 60, 10), (0, 50, 10, 60)


def test_errors_of_three_detections() -> None:
    half = (0, 0, 10, 6)  # IoU of 0.6 with A
    case = arrays(CLASSES, [1], [(1, 1, A), (1, 2, B)], [(1, 1, half, 0.9), (1, 1, C, 0.3), (1, 2, B, 0.7)])
    result = calibration(*case, len(CLASSES))
    assert result.d_ece == pytest.approx((0.1 + 0.3 + 0.3) / 3)
    assert result.la_ece == pytest.approx(((0.3 + 0.3) / 2 + 0.3) / 2)  # the mean of cat and dog
    assert result.by_class[2].la_ece == -1


def test_a_bin_averages_before_it_compares() -> None:
    case = arrays(CLASSES, [1], [(1, 1, A)], [(1, 1, A, 0.51), (1, 1, C, 0.52)])
    result = calibration(*case, len(CLASSES))
    assert result.all.counts.sum() == result.all.counts.max() == 2
    assert result.d_ece == pytest.approx(0.015)


def test_no_detections() -> None:
    result = calibration(*arrays(CLASSES, [1], [(1, 1, A)], []), len(CLASSES))
    assert (result.d_ece, result.la_ece) == (-1, -1)


def test_scores_at_the_ends_have_bins() -> None:
    result = calibration(*arrays(CLASSES, [1], [(1, 1, A)], [(1, 1, A, 1.0), (1, 1, C, 0.0)]), len(CLASSES))
    assert (result.all.counts[-1], result.all.counts[0]) == (1, 1)
    assert result.d_ece == 0


@pytest.mark.parametrize("seed", range(3))
def test_errors_equal_a_loop_over_bins(seed: int) -> None:
    truth, detections = random_case(seed, CLASSES)
    matches = match(truth, detections)

    def loop(label: int | None, weigh_iou: bool) -> float:
        rows = [
            i
            for i in range(len(detections.score))
            if matches.counted[i] and detections.label[i] == (label or detections.label[i])
        ]
        error = 0.0
        for index in range(BINS):
            inside = [i for i in rows if index / BINS < detections.score[i] <= (index + 1) / BINS]
            if inside:
                right = [i for i in inside if matches.correct[i]]
                target = len(right) / len(inside)
                if weigh_iou and right:
                    target *= float(np.mean([matches.iou[i] for i in right]))
                score = float(np.mean([detections.score[i] for i in inside]))
                error += len(inside) / len(rows) * abs(score - target)
        return error

    result = calibration(truth, detections, len(CLASSES))
    assert result.d_ece == pytest.approx(loop(None, False))
    assert result.la_ece == pytest.approx(np.mean([loop(label, True) for label in range(1, len(CLASSES) + 1)]))
