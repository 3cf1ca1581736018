"""Anchor geometries that torchvision lacks match slow loops; the default geometry is torchvision's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from distill.detectors import anchors as anchor_parts
from distill.detectors import registry, student_files
from distill.detectors.description import RENAMED_OPTIONS
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.retinanet import RetinaNet
from distill.type_checks import leaves
from distill.types import Batch, DistillError, Target
from helpers.detectors import nested

HEIGHT, WIDTH = 96, 160  # no multiples of 64 or 128, so that nominal and fitted steps differ on the coarse levels


def small(family: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    extra: dict[str, Any] = {"score_thresh": 0.001}
    if family is FasterRCNN:
        extra = {"head_channels": 16, "rpn_post_nms_top_n_test": 20, "score_thresh": 0.001}
    return family(["cat", "dog"], **nested({"depth": 10, "width": 0.125, "neck_channels": 32, **extra, **options}))


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    target = Target(torch.tensor([[8.0, 8.0, 60.0, 50.0]]), torch.tensor([1]))
    return Batch(images, ((HEIGHT, WIDTH),), ((HEIGHT, WIDTH),), (target,), (1,))


# -- anchors


def slow_anchors(
    stride: int, sizes: list[float], ratios: list[float], offset: float, rounded: bool, order: str, step: str
) -> list[list[float]]:
    rows, columns = math.ceil(HEIGHT / stride), math.ceil(WIDTH / stride)
    dy, dx = (HEIGHT // rows, WIDTH // columns) if step == "fitted" else (stride, stride)
    cell = [(s, r) for r in ratios for s in sizes] if order == "ratio" else [(s, r) for s in sizes for r in ratios]
    corners = []
    for y, x in itertools.product(range(rows), range(columns)):
        for size, ratio in cell:
            w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
            half = (
                [round(-w / 2), round(-h / 2), round(w / 2), round(h / 2)]
                if rounded
                else [-w / 2, -h / 2, w / 2, h / 2]
            )
            cx, cy = (x + offset) * dx, (y + offset) * dy
            corners.append([cx + half[0], cy + half[1], cx + half[2], cy + half[3]])
    return corners


@pytest.mark.parametrize("family", [FasterRCNN, RetinaNet])
@pytest.mark.parametrize(
    ("offset", "rounded", "order", "step"),
    [
        (0.0, True, "ratio", "fitted"),
        (0.5, True, "ratio", "fitted"),
        (0.0, False, "ratio", "fitted"),
        (0.0, True, "size", "fitted"),
        (0.0, True, "ratio", "nominal"),
        (0.5, False, "size", "nominal"),
    ],
)
def test_anchors_lie_where_they_are_said_to(family: Any, offset: float, rounded: bool, order: str, step: str) -> None:
    sizes, ratios = [[s, s * 1.3, s * 1.7] for s in (11, 23, 47, 91, 190)], [0.5, 1.0, 2.0]
    options = {"anchor_offset": offset, "anchor_rounded": rounded, "anchor_order": order, "anchor_step": step}
    detector = small(family, anchor_sizes=sizes, anchor_ratios=ratios, **options)
    levels = detector.view(batch()).anchors
    assert list(levels) == list(detector.spec.neck)
    for (stride, anchors), level in zip(levels.items(), sizes, strict=True):
        expected = torch.tensor(slow_anchors(stride, level, ratios, offset, rounded, order, step))
        assert anchors.shape == expected.shape
        assert torch.allclose(anchors, expected, atol=1e-4)


# -- deltas, proposals, P7


def slow_decode(delta: list[float], anchor: list[float], weights: tuple[float, ...], both: bool) -> list[float]:
    limit = abs(math.log(16 / 1000))
    tx, ty, tw, th = (value / weight for value, weight in zip(delta, weights, strict=True))
    tw, th = (max(min(t, limit), -limit) if both else min(t, limit) for t in (tw, th))
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    cx, cy = anchor[0] + w / 2 + tx * w, anchor[1] + h / 2 + ty * h
    w, h = w * math.exp(tw), h * math.exp(th)
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


@pytest.mark.parametrize("clamp", ["upper", "both"])
def test_deltas_are_clamped_on_the_named_sides(clamp: str) -> None:
    anchors = [[0.0, 0.0, 2000.0, 1000.0], [10.0, 20.0, 110.0, 70.0]]
    deltas = [[0.1, -0.2, -30.0, 60.0, 1.0, 2.0, -5.0, 0.5], [0.0, 0.5, 3.0, -90.0, 0.0, 0.0, 0.0, -4.0]]
    two, one = small(FasterRCNN, delta_clamp=clamp).net, small(RetinaNet, delta_clamp=clamp).net
    for part in (two.rpn, two.roi_heads, one, one.head.regression_head):
        decoded = part.box_coder.decode_single(torch.tensor(deltas), torch.tensor(anchors))
        for row, (delta, anchor) in enumerate(zip(deltas, anchors, strict=True)):
            for first in (0, 4):
                expected = slow_decode(delta[first : first + 4], anchor, part.box_coder.weights, clamp == "both")
                assert torch.allclose(decoded[row, first : first + 4], torch.tensor(expected), rtol=1e-4, atol=1e-2)


def test_the_smallest_proposal_is_as_small_as_it_is_said() -> None:
    boxes = torch.tensor(
        [[[0.0, 0.0, 9.0, 9.0], [20.0, 0.0, 20.0005, 9.0], [40.0, 0.0, 40.0, 9.0], [60.0, 0.0, 60.5, 9.0]]]
    )
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for smallest, expected in ((1e-3, [0, 3]), (0.0, [0, 1, 3]), (1.0, [0])):
        rpn = small(FasterRCNN, proposal_min_size=smallest).net.rpn
        kept, _ = rpn.filter_proposals(boxes, scores, [(HEIGHT, WIDTH)], [4])
        assert torch.equal(kept[0], boxes[0, expected])


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("source", ["p5", "c5"])
def test_p7_comes_from_p6_with_or_without_a_relu(source: str, relu: bool) -> None:
    detector = small(RetinaNet, p6_from=source, p7_relu=relu)
    view = detector.view(batch())
    extra, neck = detector.net.backbone.fpn.extra_blocks, view.neck
    p6 = F.conv2d(neck[32] if source == "p5" else view.body[32], extra.p6.weight, extra.p6.bias, stride=2, padding=1)
    assert torch.equal(neck[64], p6)
    assert (p6 < 0).any()
    p7 = F.conv2d(p6.clamp(min=0) if relu else p6, extra.p7.weight, extra.p7.bias, stride=2, padding=1)
    assert torch.equal(neck[128], p7)


# -- pixels


def test_bgr_turns_the_channels_before_it_normalises() -> None:
    mean, std = (0.1, 0.4, 0.9), (0.5, 0.2, 1.0)
    view, data = small(RetinaNet, channel_order="bgr", mean=mean, std=std).view(batch()), batch()
    for fed, channel in enumerate((2, 1, 0)):
        expected = (data.images[0, channel].double() / 255 - mean[fed]) / std[fed]
        assert torch.allclose(view.images[0, fed].double(), expected, atol=1e-6)


FOREIGN: dict[str, Any] = {
    "channel_order": "bgr",
    "mean": (0.406, 0.456, 0.485),
    "std": (1 / 255,) * 3,
    "anchor_offset": 0.5,
    "anchor_rounded": False,
    "anchor_order": "size",
    "anchor_step": "nominal",
    "delta_clamp": "both",
}
OF: dict[Any, dict[str, Any]] = {
    FasterRCNN: {
        "proposal_min_size": 0.0,
        "box_roi_aligned": True,
        "box_level_rule": "detectron2",
        "box_sampling_ratio": 0,
    },
    RetinaNet: {"p6_from": "c5", "p7_relu": False},
}


@pytest.mark.parametrize("family", [FasterRCNN, RetinaNet])
def test_the_bare_network_does_the_same_as_the_view(family: Any) -> None:
    detector, data = small(family, **FOREIGN, **OF[family]), batch()
    detector.net.transform.resize = lambda image, target: (image, target)
    image, target = data.images[0].float() / 255, data.targets[0]
    torch.manual_seed(1)
    view_losses = detector.view(data).losses
    torch.manual_seed(1)
    network_losses = detector.net([image], [{"boxes": target.boxes, "labels": target.labels}])
    assert list(view_losses) == list(network_losses)
    assert all(torch.equal(value, network_losses[name]) for name, value in view_losses.items())
    (detections,), (expected,) = detector.eval().view(data, training=False).detections, detector.net([image])
    known = expected["labels"] > 0
    assert known.sum() > 3
    assert torch.equal(detections.boxes, expected["boxes"][known])


@pytest.mark.parametrize("family", [FasterRCNN, RetinaNet])
def test_every_geometry_travels_with_the_weights_and_is_held(family: Any, tmp_path: Any) -> None:
    student = small(family, **FOREIGN, **OF[family])
    student_files.save_student(student, tmp_path)
    assert registry.load_detector(tmp_path).describe() == student.describe()
    options = {**FOREIGN, **OF[family]}
    paths = {name: RENAMED_OPTIONS.get(name, name) for name in options}
    assert anchor_parts.DEFAULTS.keys() & paths.values()
    for name in (name for name, path in paths.items() if path in anchor_parts.DEFAULTS):
        others = {key: value for key, value in options.items() if key != name}
        with pytest.raises(DistillError, match=f"made for .*{paths[name]}="):
            small(family, **others, weights=str(tmp_path))


def test_defaults_are_torchvisions_own_parts() -> None:
    two, one = small(FasterRCNN), small(RetinaNet)
    assert {type(net.transform) for net in (two.net, one.net)} == {GeneralizedRCNNTransform}
    assert {type(net) for net in (two.net.rpn.anchor_generator, one.net.anchor_generator)} == {AnchorGenerator}
    assert {type(part.box_coder) for part in (two.net.rpn, two.net.roi_heads, one.net)} == {BoxCoder}
    assert type(one.pool.map_levels) is LevelMapper
    assert type(one.net.backbone.fpn.extra_blocks) is LastLevelP6P7
    for detector in (two, one):
        described = dict(leaves(detector.describe()))
        shared = {name: described[name] for name in anchor_parts.DEFAULTS if name in described}
        assert len(shared) > 5
        assert shared.items() <= anchor_parts.DEFAULTS.items()


WORDS = ("pixels.channel_order", "anchors.order", "anchors.step", "delta_clamp")


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in (FasterRCNN, RetinaNet) for name in WORDS] + [(FasterRCNN, "box_level_rule")],
)
def test_an_unknown_word_is_refused_by_name(family: Any, name: str) -> None:
    with pytest.raises(DistillError, match=f"{name}: expected .*{anchor_parts.DEFAULTS[name]}.*'middle'"):
        small(family, **{name: "middle"})


def test_an_offset_is_a_part_of_a_step() -> None:
    with pytest.raises(DistillError, match=r"anchors\.offset"):
        small(RetinaNet, anchor_offset=4)
