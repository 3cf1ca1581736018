"""Boxes compared row by row: torchvision's values for all pairs, and boxes without area."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from distill.boxes import paired_giou, paired_iou
from helpers.fake_view import corners


def test_rows_are_the_diagonal_of_torchvisions_tables() -> None:
    boxes, truth = (corners(50, 60, 80, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(paired_iou(boxes, truth), box_iou(boxes, truth).diag())
    torch.testing.assert_close(paired_giou(boxes, truth), generalized_box_iou(boxes, truth).diag())


def test_boxes_without_area_and_equal_boxes() -> None:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 4.0], [3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    values = paired_giou(boxes, boxes.detach())
    assert values.tolist() == pytest.approx([1, 0])
    values.sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()
