"""Curves over the threshold against a loop over all thresholds, and a confusion matrix counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from distill.analysis.thresholds import ALL, confident, confusion_matrix, select, threshold_curves
from distill.evaluation.matching import counted_objects, match
from helpers.detection_cases import arrays, random_case

CLASSES = ("cat", "dog", "owl")


@pytest.mark.parametrize("seed", range(3))
def test_curves_equal_a_count_at_each_threshold(seed: int) -> None:
    truth, detections = random_case(seed, CLASSES)
    detections = detections._replace(score=np.round(detections.score, 1))
    curves = threshold_curves(truth, detections, CLASSES)
    for label, name in [(None, ALL), *enumerate(CLASSES, start=1)]:
        curve = curves[name]
        assert list(curve.score) == sorted(set(curve.score), reverse=True)
        chosen = detections if label is None else select(detections, detections.label == label)
        objects = counted_objects(truth) & (np.ones(len(truth.label), bool) if label is None else truth.label == label)
        for index, score in enumerate(curve.score):
            kept = match(truth, select(chosen, chosen.score >= score))
            found, number = int(kept.correct.sum()), int(kept.counted.sum())
            expected = (found / number, found / objects.sum(), 2 * found / (number + objects.sum()))
            assert (curve.precision[index], curve.recall[index], curve.f1[index]) == pytest.approx(expected)
        assert curve.best is not None
        assert curve.f1[curve.best] == curve.f1.max()
        assert curve.threshold == curve.score[curve.best]


def test_a_class_without_true_positives_has_no_threshold() -> None:
    box = (0, 0, 10, 10)
    case = arrays(CLASSES, [1], [(1, 1, box)], [(1, 2, box, 0.6), (1, 3, box, 0.4)])
    curves = threshold_curves(*case, CLASSES)
    assert {name: curve.threshold for name, curve in curves.items()} == dict.fromkeys((ALL, *CLASSES))
    assert confident(case[1], curves, CLASSES).label.tolist() == [2]  # the fallback is 0.5


def test_confusion_matrix() -> None:
    a, b, c = (0, 0, 10, 10), (50, 0, 60, 10), (0, 50, 10, 60)
    objects = [(1, 1, a), (1, 2, b), (1, 3, c), (2, 1, a)]
    crowd = (1, 2, (200, 200, 260, 260))
    detections = [
        (1, 1, a, 0.9),  # a cat
        (1, 2, a, 0.95),  # the cat again, as a dog: the cat is taken by its true positive
        (1, 3, b, 0.8),  # the dog as an owl
        (1, 2, (210, 210, 220, 220), 0.7),  # in a crowd
        (2, 2, c, 0.6),  # nothing
    ]
    counts = confusion_matrix(*arrays(CLASSES, [1, 2], objects, detections, [crowd]), len(CLASSES))
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1], [0, 2, 0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix_counts_every_object_and_detection_once(seed: int) -> None:
    truth, detections = random_case(seed, CLASSES)
    counts = confusion_matrix(truth, detections, len(CLASSES))
    matches = match(truth, detections)
    for label in range(1, len(CLASSES) + 1):
        assert counts[label - 1].sum() == np.count_nonzero(counted_objects(truth) & (truth.label == label))
        assert counts[:, label - 1].sum() == np.count_nonzero(matches.counted & (detections.label == label))
        assert counts[label - 1, label - 1] == np.count_nonzero(matches.correct & (detections.label == label))
