from __future__ import annotations

import torch

from distill.export.parity import compare_detections
from distill.types import Detections


def found(*rows: tuple[float, float, int]) -> Detections:
    """Boxes of 10 pixels at x, with score and label."""
    boxes = torch.tensor([[x, 0, x + 10, 10] for x, _, _ in rows]).reshape(-1, 4)
    return Detections(boxes, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]))


def test_order_of_equal_scores_does_not_matter() -> None:
    ours = found((0, 0.5, 1), (50, 0.5, 1), (90, 0.4, 2))
    parity = compare_detections([ours], [found((50, 0.5, 1), (0.25, 0.5, 1), (90, 0.4, 2))])
    assert (parity.missing, parity.surplus, parity.agreement) == (0, 0, 1.0)
    assert parity.pixels == 0.25


def test_other_labels_boxes_and_scores_are_no_pairs() -> None:
    ours = found((0, 0.5, 1), (50, 0.5, 1), (90, 0.4, 2))
    parity = compare_detections([ours], [found((0, 0.5, 2), (52, 0.5, 1), (90, 0.45, 2), (200, 0.1, 1))])
    assert (parity.missing, parity.surplus, parity.agreement) == (3, 4, 0.0)


def test_one_detection_is_no_pair_for_two() -> None:
    parity = compare_detections([found((0, 0.5, 1), (0, 0.5, 1))], [found((0, 0.5, 1))])
    assert (parity.missing, parity.surplus, parity.agreement) == (1, 0, 0.5)


def test_no_detections_agree() -> None:
    assert compare_detections([found()], [found()]).agreement == 1.0
