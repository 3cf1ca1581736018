"""The rules for final detections, and the options of detectors for other projects' weights, against numbers by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.detectors.backbones import ResNet
from distill.detectors.detection_rules import _dense_detections, finish, paste_sampled
from distill.detectors.fcos import FCOS
from distill.detectors.retinanet import RetinaNet
from distill.types import Batch, Detections, DistillError, Target
from helpers.detectors import nested, random_detector

SMALL: dict[str, Any] = {"depth": 10, "width": 0.125, "neck_channels": 64}


def batch() -> Batch:
    pixels = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return Batch(pixels, ((60, 90),), ((120, 180),), (empty,), (1,))


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def dense(rule: str, classes: list[float], centerness: list[float], boxes: list[list[float]]) -> dict[str, Tensor]:
    """Detections of one class, whose boxes are the deltas, in an image of 100 x 100 pixels."""
    count = len(classes)
    outputs = {
        "cls_logits": [torch.tensor([[[9.0, logit(value)] for value in classes]])],
        "bbox_ctrness": [torch.tensor([[[logit(value)] for value in centerness]])],
        "bbox_regression": [torch.tensor([boxes])],
    }
    net = SimpleNamespace(score_thresh=0.2, nms_thresh=0.6, topk_candidates=10, detections_per_img=10)
    anchors = [[torch.zeros(count, 4)]]
    (found,) = _dense_detections(net, rule, lambda deltas, _: deltas, outputs, anchors, [(100, 100)])
    return found


def test_mmdetection_multiplies_and_detectron2_takes_the_root() -> None:
    boxes = [[0.0, 0, 10, 10], [50.0, 50, 60, 60]]
    # The class alone decides in MMDetection: 0.25 stays, with the score 0.25 x 0.04. Detectron2: sqrt(0.01) is dropped.
    product, root = (dense(rule, [0.9, 0.25], [0.4, 0.04], boxes) for rule in ("mmdetection", "detectron2"))
    assert product["scores"].tolist() == pytest.approx([0.36, 0.01], abs=1e-6)
    assert root["scores"].tolist() == pytest.approx([0.6], abs=1e-6)
    assert product["labels"].tolist() == [1, 1]


def test_clipping_comes_before_nms_in_mmdetection_and_after_it_in_detectron2() -> None:
    """Clipped, both boxes are equal. Unclipped, they overlap by 0.5."""
    boxes = [[90.0, 0, 110, 10], [90.0, 0, 130, 10]]
    counts = {rule: len(dense(rule, [0.9, 0.8], [0.9, 0.9], boxes)["boxes"]) for rule in ("mmdetection", "detectron2")}
    assert counts == {"mmdetection": 1, "detectron2": 2}


def test_only_version_2_of_mmdetection_keeps_boxes_in_the_padding() -> None:
    boxes = [[120.0, 0, 130, 10], [0.0, 0, 10, 10]]
    counts = {
        rule: len(dense(rule, [0.9, 0.9], [0.9, 0.9], boxes)["boxes"]) for rule in ("mmdetection", "mmdetection2")
    }
    assert counts == {"mmdetection": 1, "mmdetection2": 2}


def test_detectron2_drops_empty_boxes_at_the_end() -> None:
    found = Detections(torch.tensor([[0.0, 0, 0, 5], [0.0, 0, 1, 1]]), torch.ones(2), torch.ones(2).long())
    assert [len(finish(found, rule).boxes) for rule in ("detectron2", "mmdetection", "torchvision")] == [1, 2, 2]


def test_masks_are_sampled_at_pixel_centers() -> None:
    """A box of 2 x 2 cells over 4 x 4 pixels: the upper left cell is 1. The value at a pixel is bilinear."""
    cells = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    mask = paste_sampled(cells, torch.tensor([[1.0, 1.0, 5.0, 5.0]]), (6, 7))[0]
    # Pixel centers are 0.25, 0.75, 1.25, 1.75 cells from the corner; weights of cell 0 along an axis: 0.75 (zero
    # padding), 0.75, 0.25, 0.
    weights = torch.tensor([0.75, 0.75, 0.25, 0.0])
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[1:5, 1:5] = weights[:, None] * weights[None] >= 0.5
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("rule", ["detectron2", "mmdetection"])
@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_every_family_has_every_rule(family: str, rule: str) -> None:
    """Without clipped or empty boxes the rules differ in the score of FCOS alone."""
    pair = [random_detector(family, detection_rule=name, score_thresh=0.01).eval() for name in ("torchvision", rule)]
    pair[1].net.load_state_dict(pair[0].net.state_dict())
    found = [detector.view(batch(), training=False, frozen=True).detections[0] for detector in pair]
    assert len(found[1].boxes) > 0
    assert found[1].labels.min() > 0
    assert (found[1].boxes[:, 2] <= 180).all()
    if family == "faster_rcnn":
        assert torch.equal(found[0].boxes, found[1].boxes)


def fcos(**options: Any) -> Any:
    torch.manual_seed(0)
    return FCOS(["cat"], **nested({**SMALL, **options})).eval()


def test_fcos_has_the_papers_points_distances_and_scales() -> None:
    detector = fcos(point_offset=0.5, point_step="nominal", distances="exp", level_scales=True, centerness_from="class")
    head = detector.net.head
    torch.nn.init.normal_(head.regression_head.bbox_reg.weight, std=0.05)
    head.regression_head.scales.data = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    view = detector.view(batch(), training=False, frozen=True)
    assert view.points[8][:2].tolist() == [[4.0, 4.0], [12.0, 4.0]]
    raw = head.regression_head.bbox_reg(head.regression_head.conv(view.neck[16]))
    assert torch.allclose(view.deltas[16], torch.exp(2 * raw) / 16, atol=1e-6)
    tower = head.classification_head.conv(view.neck[8])
    assert torch.equal(view.centerness[8], head.regression_head.bbox_ctrness(tower))
    outputs = head(list(view.neck.values()))  # torchvision's own forward pass gives the same
    for name, levels in view._flat().items():
        assert torch.equal(outputs[name], torch.cat(levels, dim=1))
    assert torch.allclose(view.finish_tower("boxes", 0, view.neck)[16], view.deltas[16], atol=1e-6)


@pytest.mark.parametrize("family", [RetinaNet, FCOS])
def test_p6_may_come_from_the_lateral_map(family: Any) -> None:
    torch.manual_seed(0)
    detector = family(["cat"], **nested({**SMALL, "p6_from": "lateral"})).eval()
    view = detector.view(batch(), training=False, frozen=True)
    fpn = detector.net.backbone.fpn
    expected = fpn.extra_blocks.p6(fpn.inner_blocks[-1](view.body[32]))
    assert torch.equal(view.neck[64], expected)
    assert not any("lateral" in name for name in detector.state_dict())


def test_a_resnext_has_groups() -> None:
    body = ResNet(50, groups=32, group_width=8)
    assert body.layer1[0].conv2.weight.shape == (256, 8, 3, 3)
    assert body.layer4[2].conv2.weight.shape == (2048, 64, 3, 3)
    with pytest.raises(DistillError, match="groups"):
        ResNet(18, groups=32)


@pytest.mark.parametrize("option", ["anchor_delta_weights", "box_delta_weights"])
def test_delta_weights_are_four_numbers(option: str) -> None:
    with pytest.raises(DistillError, match=option):
        random_detector("faster_rcnn", **{option: [1.0, 0.0, 1.0, 1.0]})
