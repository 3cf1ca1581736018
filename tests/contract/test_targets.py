"""What a View says that ground truth asks for: with it, the detector's own losses can be written down again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from distill.losses.heads import label_deltas
from distill.types import Pyramid
from helpers.detectors import padded_batch, random_detector


def flat(maps: Pyramid, columns: int) -> Tensor:
    """(B, A*columns, H, W) per level -> (B, N, columns), rows in the order (row, column, anchor)."""
    levels = []
    for x in maps.values():
        images, channels, height, width = x.shape
        level = x.reshape(images, channels // columns, columns, height, width).permute(0, 3, 4, 1, 2)
        levels.append(level.reshape(images, -1, columns))
    return torch.cat(levels, 1)


def smooth_l1(error: Tensor, beta: float) -> Tensor:
    error = error.abs()
    return torch.where(error < beta, error.square() / (2 * beta), error - beta / 2).sum()


def test_two_stage_losses_follow_from_the_targets() -> None:
    view = random_detector("faster_rcnn").view(padded_batch(), seed=3)
    labels, deltas, sampled = view.anchor_targets
    assert set(labels.unique().tolist()) == {-1, 0, 1}
    assert not (labels[1] > 0).any()  # an image without boxes
    objectness, dense = flat(view.objectness, 1)[..., 0], flat(view.deltas, 4)
    expected = -F.logsigmoid(torch.where(labels > 0, objectness, -objectness))[sampled].mean()
    assert view.losses["loss_objectness"].item() == pytest.approx(expected.item(), rel=1e-5)
    positive = sampled & (labels > 0)
    expected = smooth_l1((dense - deltas)[positive], 1 / 9) / sampled.sum()
    assert view.losses["loss_rpn_box_reg"].item() == pytest.approx(expected.item(), rel=1e-5)

    boxes, names, truth, moves = (torch.cat(values) for values in view.rois)
    logits, all_deltas = view.roi_logits(view.rois.boxes)
    assert view.losses["loss_classifier"].item() == pytest.approx(F.cross_entropy(logits, names).item(), rel=1e-5)
    foreground = names > 0
    expected = smooth_l1((label_deltas(all_deltas, names) - moves)[foreground], 1 / 9) / len(names)
    assert view.losses["loss_box_reg"].item() == pytest.approx(expected.item(), rel=1e-5)

    assert (box_iou(boxes[foreground], truth[foreground]).diagonal() >= 0.5).all()
    for image, target in enumerate(view.batch.targets):
        for values in view.rois.truth[image].tolist():
            assert values in target.boxes.tolist() or (not len(target.boxes) and values == [0, 0, 0, 0])


def test_the_truth_of_a_positive_region_is_the_box_that_it_overlaps_most() -> None:
    """The row of a negative region has no meaning."""
    view = random_detector("faster_rcnn").view(padded_batch(), seed=3)
    for boxes, labels, truth, target in zip(*view.rois[:3], view.batch.targets, strict=True):
        positive = labels > 0
        if positive.any():
            best = box_iou(boxes[positive], target.boxes).argmax(1)
            assert torch.equal(truth[positive], target.boxes[best])
            assert torch.equal(labels[positive], target.labels[best])
            assert (best > 0).any()  # not only the image's first box


def test_regions_are_moved_as_their_deltas_say() -> None:
    view = random_detector("faster_rcnn").view(padded_batch(), seed=3)
    moved = view.roi_boxes(view.rois.boxes)
    deltas = view.roi_logits(view.rois.boxes)[1]
    boxes = torch.cat(view.rois.boxes)
    assert moved.shape == (len(boxes), 4, 4)
    for region in (0, 5, len(boxes) - 1):
        x1, y1, x2, y2 = boxes[region].tolist()
        dx, dy, dw, dh = deltas[region, 8:12].tolist()  # of class 2; coded with the weights 10, 10, 5, 5
        x, y = (x1 + x2) / 2 + dx / 10 * (x2 - x1), (y1 + y2) / 2 + dy / 10 * (y2 - y1)
        w, h = (x2 - x1) * math.exp(dw / 5), (y2 - y1) * math.exp(dh / 5)
        expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        assert moved[region, 2].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_one_stage_losses_follow_from_the_targets() -> None:
    view = random_detector("retinanet").view(padded_batch())
    labels, deltas, sampled = view.anchor_targets
    assert set(labels.unique().tolist()) == {-1, 0, 1, 2, 3}
    assert torch.equal(sampled, labels >= 0)
    logits, dense = flat(view.class_logits, 3), flat(view.deltas, 4)
    classes, boxes = 0.0, 0.0
    for image in range(len(view.batch)):
        count = max(1, int((labels[image] > 0).sum()))
        wanted = F.one_hot(labels[image].clamp(min=0), 4)[:, 1:].bool()
        p = torch.sigmoid(logits[image])
        right = torch.where(wanted, p, 1 - p)
        alpha = torch.where(wanted, 0.25, 0.75)
        focal = -alpha * (1 - right).square() * right.clamp(min=1e-12).log()
        # torchvision's label 0, which no class has, is a background column in its loss: added here by hand.
        unused = torch.cat([x[:, ::4].permute(0, 2, 3, 1).reshape(3, -1) for x in view._logits.values()], 1)[image]
        extra = 0.75 * torch.sigmoid(unused).square() * -F.logsigmoid(-unused)
        classes += (focal[sampled[image]].sum() + extra[sampled[image]].sum()).item() / count
        error = (dense[image] - deltas[image])[labels[image] > 0].abs().sum()
        boxes += error.item() / count
    assert view.losses["classification"].item() == pytest.approx(classes / 3, rel=1e-4)
    assert view.losses["bbox_regression"].item() == pytest.approx(boxes / 3, rel=1e-4)


def test_anchor_free_losses_follow_from_the_targets() -> None:
    view = random_detector("fcos").view(padded_batch())
    labels, deltas, sampled = view.anchor_targets
    assert {0, 1, 2, 3} >= set(labels.unique().tolist()) > {0}
    assert sampled.all()
    assert not (labels[1] > 0).any()
    positive = labels > 0
    anchors = torch.cat(list(view.anchors.values()))
    point, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    wanted = 0.0
    for image, index in positive.nonzero().tolist():
        name, sides = int(labels[image, index]), deltas[image, index] * stride[index].repeat(2)
        box = torch.cat([point[index] - sides[:2], point[index] + sides[2:]])
        target = view.batch.targets[image]
        near = (target.boxes - box).abs().amax(1)
        assert near.min() < 1e-3
        assert int(target.labels[near.argmin()]) == name
        left, top, right, bottom = sides.tolist()
        truth = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        logit = flat(view.centerness, 1)[image, index, 0]
        wanted += (-truth * F.logsigmoid(logit) - (1 - truth) * F.logsigmoid(-logit)).item()
    assert view.losses["bbox_ctrness"].item() == pytest.approx(wanted / int(positive.sum()), rel=1e-4)
