"""The View's promises: equal to torchvision bit for bit, lazy, the same in any reading order, float32 geometry."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.types import Batch, DistillError, Target
from helpers.detectors import BOX_FAMILIES, FAMILIES, FEW, SIZES, count_calls, gradients, padded_batch, random_detector
from helpers.grids import exhaustive


def torchvision_input(data: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(data.images, data.sizes, strict=True)]
    return images, [{"boxes": target.boxes, "labels": target.labels} for target in data.targets]


def unresized(detector: Any) -> Any:
    """torchvision's own model, which takes the images as they are."""
    detector.net.transform.resize = lambda image, target: (image, target)
    return detector.net


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("family", BOX_FAMILIES)
@pytest.mark.parametrize("options", [{"norm": "frozen"}, {"norm": "batch", "depth": 18, "trainable_stages": 5}])
def test_losses_and_gradients_equal_torchvision_bit_for_bit(family: str, options: dict[str, Any]) -> None:
    detector, data = random_detector(family, **options, **FAMILIES[family].equals_torchvision), padded_batch()
    torch.manual_seed(7)
    view_losses = detector.view(data).losses
    sum(view_losses.values()).backward()
    our_gradients = gradients(detector)
    torch.manual_seed(7)
    expected = unresized(detector)(*torchvision_input(data))
    sum(expected.values()).backward()
    assert list(view_losses) == list(expected)
    assert_same(view_losses, expected)
    assert_same(our_gradients, gradients(detector))
    assert len(our_gradients) > 30


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn"])
def test_regions_pooled_by_cells_give_the_same_but_for_rounding(family: str) -> None:
    """Of both pools, in a step and in the gradients of every weight; masks of a Mask R-CNN are pooled to 14 x 14."""
    results = []
    for kernel in ("fast", "torchvision"):
        detector, data = random_detector(family, box_roi_align=kernel), padded_batch()
        view: Any = detector.view(data, seed=3)
        boxes = view.rois.boxes
        terms = [*view.roi_logits(boxes), view.roi_features(boxes)]
        terms += [view.mask_logits(boxes)] if family == "mask_rcnn" else []
        sum(value.square().mean() for value in terms).backward()  # type: ignore[union-attr]
        results.append((terms, gradients(detector)))
    (terms, our_gradients), (expected, their_gradients) = results
    assert our_gradients.keys() == their_gradients.keys()
    for one, other in [
        *zip(terms, expected, strict=True),
        *((our_gradients[k], their_gradients[k]) for k in our_gradients),
    ]:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.detach().abs().max().item())


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_detections_equal_torchvision_bit_for_bit(family: str) -> None:
    detector, data = random_detector(family, **FAMILIES[family].equals_torchvision).eval(), padded_batch()
    detections = detector.view(data, training=False).detections
    reference = unresized(detector)(torchvision_input(data)[0])
    for actual, other in zip(detections, reference, strict=True):
        classes = other["labels"] > 0  # torchvision's one-stage detectors may name the label that no class has
        assert classes.sum() > 5
        assert torch.equal(actual.boxes, other["boxes"][classes])
        assert torch.equal(actual.scores, other["scores"][classes])
        assert torch.equal(actual.labels, other["labels"][classes])


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_foreign_default_model_loads_the_state_dict_and_agrees(family: str) -> None:
    from torchvision.models import resnet
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    row, body = FAMILIES[family], resnet.resnet18(weights=None, norm_layer=torch.nn.BatchNorm2d)
    if row.two_stage:
        few, backbone = {"rpn_post_nms_top_n_test": 50}, _resnet_fpn_extractor(body, 5)
    else:
        few, extra = {"score_thresh": 0.005}, LastLevelP6P7(256, 256)
        backbone = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=extra)
    reference = row.original(backbone, 4, **few)
    detector: Any = row.detector(["a", "b", "c"], backbone={"depth": 18}, **few, **row.equals_torchvision)
    reference.load_state_dict(detector.net.state_dict(), strict=True)
    reference.transform.resize = lambda image, target: (image, target)
    data = padded_batch()
    for actual, other in zip(
        detector.eval().view(data, training=False).detections, reference.eval()(torchvision_input(data)[0]), strict=True
    ):
        keep = other["labels"] > 0
        assert keep.any()
        assert torch.equal(actual.boxes, other["boxes"][keep])
        assert torch.equal(actual.scores, other["scores"][keep])


# backbone -> its network's children that give C2..C5, and their channels, as torchvision's source has them
BODIES: dict[str, tuple[tuple[str, ...], list[int]]] = {
    "mobilenet_v2": (("3", "6", "13", "17"), [24, 32, 96, 320]),
    "mobilenet_v3_large": (("3", "6", "12", "15"), [24, 40, 112, 160]),
    "efficientnet_b0": (("2", "3", "5", "7"), [24, 40, 112, 320]),
    "resnext50_32x4d": (("layer1", "layer2", "layer3", "layer4"), [256, 512, 1024, 2048]),
}


def foreign_detector(family: str, backbone: str) -> Any:
    """torchvision's network and pyramid, put together by torchvision alone."""
    from torchvision import models
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    row, network = FAMILIES[family], models.get_model(backbone, weights=None)
    names, channels = BODIES[backbone]
    first, neck = (0 if row.two_stage else 1), row.neck_channels or 32
    extra = LastLevelMaxPool() if row.two_stage else LastLevelP6P7(neck, neck)
    layers = {name: str(index) for index, name in enumerate(names[first:])}
    body = BackboneWithFPN(getattr(network, "features", network), layers, channels[first:], neck, extra)
    return row.original(body, 4, **({**FEW, "rpn_post_nms_top_n_test": 30} if row.two_stage else {}))


@pytest.mark.parametrize("family", BOX_FAMILIES)
@pytest.mark.parametrize("backbone", list(BODIES))
def test_every_backbone_equals_torchvisions_bit_for_bit(family: str, backbone: str) -> None:
    row = FAMILIES[family]
    options = {**({"head_channels": 1024} if row.two_stage else {}), **row.equals_torchvision}
    detector = random_detector(family, backbone=backbone, depth=None, width=1.0, norm="batch", **options)
    reference, data = foreign_detector(family, backbone), padded_batch(((64, 64), (50, 60)))
    reference.load_state_dict(detector.net.state_dict(), strict=True)
    reference.transform.resize = lambda image, target: (image, target)
    assert list(detector.spec.body.values()) == BODIES[backbone][1]
    torch.manual_seed(7)
    losses = detector.view(data).losses
    sum(losses.values()).backward()
    torch.manual_seed(7)
    expected = reference(*torchvision_input(data))
    sum(expected.values()).backward()
    assert_same(losses, expected)
    assert_same(gradients(detector), {name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    assert_same(dict(detector.net.named_buffers()), dict(reference.named_buffers()))
    detections = detector.eval().view(data, training=False).detections
    for actual, other in zip(detections, reference.eval()(torchvision_input(data)[0]), strict=True):
        known = other["labels"] > 0
        assert known.any()
        assert torch.equal(actual.boxes, other["boxes"][known])
        assert torch.equal(actual.scores, other["scores"][known])


@pytest.mark.parametrize("backbone", list(BODIES))
def test_a_body_gives_the_last_map_at_each_stride(backbone: str) -> None:
    detector = random_detector("retinanet", backbone=backbone, depth=None, width=1.0, norm="batch").eval()
    view, inputs = detector.view(padded_batch(((64, 64), (50, 60)))), {}
    x = view.images
    for part in detector.net.backbone.body.values():
        x = part(x)
        inputs[64 // x.shape[-1]] = x
    assert list(view.body) == [4, 8, 16, 32]
    for stride, feature_map in view.body.items():
        assert torch.equal(feature_map, inputs[stride])
        assert feature_map.shape[1] == detector.spec.body[stride]
        assert detector.spec.body[stride] in BODIES[backbone][1]


def test_paths_dropped_by_chance_come_from_the_views_seed() -> None:
    """EfficientNet drops residual paths in training; a seeded View's draws leave the global stream alone."""
    detector, data = (
        random_detector("retinanet", backbone="efficientnet_b0", depth=None, width=1.0, norm="batch_fixed_stats"),
        padded_batch(),
    )
    before = torch.get_rng_state()
    maps = [detector.view(data, seed=seed).body[32] for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    detector.eval()
    assert torch.equal(detector.view(data, seed=1).body[32], detector.view(data, seed=2).body[32])


READS = [
    ("faster_rcnn", "anchors", ""),
    ("faster_rcnn", "body", "body"),
    ("faster_rcnn", "neck", "body fpn"),
    ("faster_rcnn", "objectness", "body fpn rpn"),
    ("faster_rcnn", "deltas", "body fpn rpn"),
    ("faster_rcnn", "proposals", "body fpn rpn"),
    ("faster_rcnn", "rois", "body fpn rpn"),
    ("faster_rcnn", "losses", "body fpn rpn pool box"),
    ("retinanet", "anchors", ""),
    ("retinanet", "body", "body"),
    ("retinanet", "neck", "body fpn"),
    ("retinanet", "class_logits", "body fpn class"),
    ("retinanet", "deltas", "body fpn trunk box"),
    ("retinanet", "losses", "body fpn class trunk box"),
    ("fcos", "anchors", ""),
    ("fcos", "body", "body"),
    ("fcos", "neck", "body fpn"),
    ("fcos", "class_logits", "body fpn class"),
    ("fcos", "deltas", "body fpn trunk box"),
    ("fcos", "centerness", "body fpn trunk centerness"),
    ("fcos", "deltas centerness", "body fpn trunk box centerness"),
    ("fcos", "losses", "body fpn class trunk box centerness"),
    ("fcos", "detections", "body fpn class trunk box centerness"),
]


@pytest.mark.parametrize(("family", "stage", "runs"), READS)
def test_only_what_is_read_is_run_and_only_once(
    family: str, stage: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = random_detector(family)
    counts, view = count_calls(detector, monkeypatch), detector.view(padded_batch())
    for name in stage.split() * 2:
        getattr(view, name)
    once = tuple(counts) if FAMILIES[family].two_stage else ("body", "fpn", "pool")
    expected = {name: (1 if name in once else 5) if name in runs.split() else 0 for name in counts}
    assert counts == expected


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_what_is_computed_ahead_is_kept_alone_and_is_what_it_would_be(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, data = random_detector(family), padded_batch()
    lazy: Any = detector.view(data, frozen=True, seed=1)
    assert_same(lazy.neck, detector.view(data).neck)
    assert lazy.stages == ["images", "body", "neck"]
    counts = count_calls(detector, monkeypatch)
    view: Any = detector.view(data, frozen=True, seed=1, prefetch=["neck"])
    assert (counts["body"], counts["fpn"]) == (1, 1)
    assert (view.stages, list(view.prefetched)) == ([], ["neck"])
    assert_same(view.neck, lazy.neck)
    assert (view.stages, view.prefetched) == (["neck"], {})
    assert_same(view.body, lazy.body)  # once more
    assert (counts["body"], counts["fpn"]) == (2, 1)
    both = detector.view(data, frozen=True, seed=1, prefetch=view.stages)
    assert_same(both.neck, lazy.neck)
    assert_same(both.body, lazy.body)
    assert (counts["body"], counts["fpn"]) == (3, 2)
    assert both.stages == ["body", "neck"]
    last: Any = detector.view(data, frozen=True, prefetch=both.stages)
    assert_same(last.body, lazy.body)
    assert last.stages == ["body"]  # so that a neck that is no longer read is no longer computed


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_step_ahead_of_all_that_is_read_computes_nothing_twice(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, data, ahead = random_detector(family), padded_batch(), []
    counts = count_calls(detector, monkeypatch)
    for _ in range(3):
        for name in counts:
            counts[name] = 0
        view: Any = detector.view(data, frozen=True, seed=1, prefetch=ahead)
        losses = dict(view.losses)
        ahead = view.stages
    assert ahead == ["losses"]
    monkeypatch.undo()
    assert_same(losses, detector.view(data, frozen=True, seed=1).losses)
    assert counts["body"] == counts["fpn"] == 1


def test_region_stages_are_kept_per_box_list(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = random_detector("faster_rcnn")
    counts, view = count_calls(detector, monkeypatch), detector.view(padded_batch())
    first = view.roi_logits(view.rois.boxes)
    assert view.roi_logits(list(view.rois.boxes)) is first
    assert view.losses
    assert counts["box"] == counts["pool"] == 1
    other = [boxes.clone() for boxes in view.rois.boxes]
    assert torch.equal(view.roi_logits(other)[0], first[0])
    assert counts["box"] == counts["pool"] == 2
    with pytest.raises(DistillError, match="one box tensor per image"):
        view.roi_features(other[:1])


def everything(view: Any, order: tuple[str, ...]) -> dict[str, Tensor]:
    for stage in order:
        if stage == "foreign boxes":
            view.roi_features([boxes[:2] * 0.5 for boxes in foreign])
        elif stage == "predictions":
            view.predictions()
        else:
            getattr(view, stage)
    values = dict(view.losses)
    if "rois" in view.spec.outputs:
        values |= {f"proposals{i}": boxes for i, boxes in enumerate(view.proposals)}
        values |= {f"rois{i}": boxes for i, boxes in enumerate(view.rois.boxes)}
        values |= {f"labels{i}": labels for i, labels in enumerate(view.rois.labels)}
    return values


foreign = [torch.tensor([[4.0, 4.0, 60.0, 60.0], [0.0, 0.0, 30.0, 64.0]])] * len(SIZES)


@pytest.mark.parametrize("seed", [exhaustive(None), 5])
@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_reading_order_changes_nothing(family: str, seed: int | None) -> None:
    detector, data = random_detector(family), padded_batch()
    outputs = detector.spec.outputs
    stages = ("rois", "losses", "predictions", "foreign boxes")
    if "rois" not in outputs:  # four stages, because five have 120 orders
        stages = ("class_logits", "deltas", "centerness" if "centerness" in outputs else "foreign boxes", "predictions")
    reference: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    for order in [(), *itertools.permutations(stages)]:
        torch.manual_seed(3)
        tensors = everything(view := detector.view(data, seed=seed), order)
        sum(view.losses.values()).backward()
        values = tensors, gradients(detector)
        if reference is None:
            reference = values
        assert_same(values[0], reference[0])
        assert_same(values[1], reference[1])


def test_the_place_of_reading_changes_nothing() -> None:
    """A stage first read under another autocast or grad mode is computed as the View was opened."""
    detector, data = random_detector("faster_rcnn"), padded_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, read_elsewhere = detector.view(data, seed=1), detector.view(data, seed=1)
        expected = inside.losses
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            losses = read_elsewhere.losses
        assert inside.neck[4].dtype == torch.bfloat16
    assert_same(losses, expected)
    assert losses["loss_classifier"].requires_grad
    assert not torch.equal(detector.view(data, seed=1).losses["loss_classifier"], expected["loss_classifier"])


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_anchors_are_float32_under_autocast(family: str) -> None:
    detector, data = random_detector(family, width=0.125), padded_batch(sizes=((800, 1216),))
    plain = detector.view(data).anchors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unresized(detector).eval()(torchvision_input(data)[0])  # torchvision leaves its cell anchors in bfloat16
        mixed = detector.view(data).anchors
    for stride, anchors in plain.items():
        assert mixed[stride].dtype == torch.float32
        assert torch.equal(mixed[stride], anchors)
    columns, first = 1216 // 8, plain[8]
    count = detector.spec.anchors[8]
    centre = (first[:, :2] + first[:, 2:]) / 2
    assert torch.allclose(centre[count * (columns * 3 + 5)], torch.tensor([5.0 * 8, 3.0 * 8]), atol=0.51)


def decoded(anchor: Tensor, delta: Tensor) -> Tensor:
    """Faster R-CNN, section 3.1.2, inverted."""
    (x1, y1, x2, y2), (tx, ty, tw, th) = anchor.double().tolist(), delta.double().tolist()
    w, h = x2 - x1, y2 - y1
    cx, cy = x1 + w / 2 + tx * w, y1 + h / 2 + ty * h
    w, h = w * math.exp(min(tw, math.log(1000 / 16))), h * math.exp(min(th, math.log(1000 / 16)))
    return torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


def test_proposals_from_given_deltas_are_float32_at_800_px() -> None:
    detector, data = random_detector("faster_rcnn", width=0.125), padded_batch(sizes=((800, 1216),))
    objectness, deltas = (
        {stride: torch.randn_like(x) for stride, x in maps.items()} for maps in detector.view(data)._dense
    )
    proposals = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            view = detector.view(data)
            view.__dict__["_dense"] = objectness, deltas
            proposals.append(view.proposals[0])
            assert all(x.dtype == torch.float32 for x in (*view.proposals, *view.rois.boxes))
            assert all(value.dtype == torch.float32 for value in view.losses.values())
    assert torch.equal(proposals[0], proposals[1])
    best = objectness[32].flatten(1).argmax()
    anchor, cell = best // (25 * 38), best % (25 * 38)
    delta = deltas[32].view(3, 4, -1)[anchor, :, cell]
    box = decoded(view.anchors[32][cell * 3 + anchor], delta)
    box = torch.stack([box[0::2].clamp(0, 1216), box[1::2].clamp(0, 800)], dim=1).flatten()
    assert (proposals[0] - box).abs().amax(dim=1).min() < 1e-3


def slow_fcos(
    logits: dict[int, Tensor], deltas: dict[int, Tensor], centerness: dict[int, Tensor], size: tuple[int, int]
) -> list[tuple[float, int, list[float]]]:
    """Score, label and box of every cell and class of the first image; a cell's point is its upper left corner."""
    values = []
    for stride, maps in logits.items():
        rows, columns = maps.shape[-2:]
        for y, x, k in itertools.product(range(rows), range(columns), range(maps.shape[1])):
            probability, central = (torch.sigmoid(m[0, c, y, x]) for m, c in ((maps, k), (centerness[stride], 0)))
            left, top, right, bottom = (deltas[stride][0, :, y, x] * stride).tolist()
            # torchvision spaces the points by the whole pixels of image / grid, which the nominal stride only names.
            px, py = x * (size[1] // columns), y * (size[0] // rows)
            box = [max(px - left, 0), max(py - top, 0), min(px + right, size[1]), min(py + bottom, size[0])]
            values.append(
                (math.sqrt(probability * central), k + 1, [max(0, min(v, size[1 - i % 2])) for i, v in enumerate(box)])
            )
    return values


@pytest.mark.parametrize("autocast", [False, True])
def test_fcos_scores_and_boxes_follow_the_formula(autocast: bool) -> None:
    detector, data = (
        random_detector("fcos", detections_per_img=10**6, topk_candidates=10**6),
        padded_batch(sizes=((64, 96),)),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        view = detector.view(data, training=False, frozen=True)
    (prediction,) = view.predictions(score=0.0, nms=1.0)
    expected = sorted(slow_fcos(view.class_logits, view.deltas, view.centerness, (64, 96)), reverse=True)
    known = [
        (s, k, b)
        for s, k, b in zip(
            prediction.scores.tolist(), prediction.labels.tolist(), prediction.boxes.tolist(), strict=True
        )
    ]
    assert len(known) == len(expected) == 3 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1)
    for actual, other in zip(sorted(known, key=rounded), sorted(expected, key=rounded), strict=True):
        assert actual[1] == other[1]
        assert actual[0] == pytest.approx(other[0], abs=1e-5)
        assert actual[2] == pytest.approx(other[2], abs=1e-3)


def rounded(one: tuple[float, int, list[float]]) -> tuple[int, list[float]]:
    return one[1], [round(value, 2) for value in one[2]]


def slow_fcos_target(points: dict[int, Tensor], boxes: list[list[float]]) -> list[tuple[int, int, int]]:
    """(stride, row of points, box) of positive cells: Tian et al. 2019, section 3, center sampling of 1.5 strides."""
    ranges = {8: (0, 64), 16: (64, 128), 32: (128, 256), 64: (256, 512), 128: (512, math.inf)}
    positive = []
    for stride, squares in points.items():
        for row, (x1, y1, x2, y2) in enumerate(squares.tolist()):
            x, y, candidates = (x1 + x2) / 2, (y1 + y2) / 2, []
            for index, (left, top, right, bottom) in enumerate(boxes):
                sides = (x - left, y - top, right - x, bottom - y)
                off = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2))
                low, high = ranges[stride]
                if min(sides) > 0 and low < max(sides) < high and off < 1.5 * stride:
                    candidates.append(((right - left) * (bottom - top), index))
            if candidates:
                positive.append((stride, row, min(candidates)[1]))
    return positive


def test_fcos_losses_follow_the_formula() -> None:
    """At 800 px and in bfloat16, with boxes for every level; one image is empty, so it only adds negatives."""
    detector, data = random_detector("fcos", width=0.125), padded_batch(sizes=((512, 800), (512, 800)))
    corners = [
        [10, 10, 60, 50],
        [20, 15, 40, 45],
        [100, 40, 250, 200],
        [300, 20, 600, 300],
        [0, 0, 780, 500],
        [5, 5, 795, 510],
    ]
    truth = Target(torch.tensor(corners, dtype=torch.float32), torch.tensor([1, 2, 3, 1, 2, 3]))
    data = Batch(data.images, data.sizes, data.sizes, (truth, Target(truth.boxes[:0], truth.labels[:0])), data.ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = detector.view(data, frozen=True)
    losses = view.losses
    positive = slow_fcos_target(view.anchors, [[float(v) for v in box] for box in corners])
    assert {stride for stride, _, _ in positive} == {8, 16, 32, 64, 128}
    assert len(positive) > 20
    assert {box for _, _, box in positive} == set(range(len(corners)))
    labels = {(stride, row): int(truth.labels[box]) for stride, row, box in positive}
    focal = giou = bce = 0.0
    for stride, maps in view._logits.items():
        p = maps.double().sigmoid().flatten(2)
        target = torch.zeros_like(p)
        for (level, row), label in labels.items():
            if level == stride:
                target[0, label, row] = 1.0
        pt, alpha = torch.where(target > 0, p, 1 - p), torch.where(target > 0, 0.25, 0.75)
        focal += float((-alpha * (1 - pt) ** 2 * pt.log()).sum())
    for stride, row, box in positive:
        x1, y1, x2, y2 = view.anchors[stride][row].tolist()
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        left, t, r, b = (view.deltas[stride][0].flatten(1)[:, row].double() * stride).tolist()
        tx1, ty1, tx2, ty2 = corners[box]
        l_, t_, r_, b_ = x - tx1, y - ty1, tx2 - x, ty2 - y
        overlap = (min(left, l_) + min(r, r_)) * (min(t, t_) + min(b, b_))
        union = (left + r) * (t + b) + (l_ + r_) * (t_ + b_) - overlap
        hull = (max(left, l_) + max(r, r_)) * (max(t, t_) + max(b, b_))
        giou += 1 - (overlap / union - (hull - union) / hull)
        central = math.sqrt(min(l_, r_) / max(l_, r_) * min(t_, b_) / max(t_, b_))
        q = float(view.centerness[stride][0].flatten().double()[row].sigmoid())
        bce += -central * math.log(q) - (1 - central) * math.log(1 - q)
    count = len(positive)
    assert losses["classification"].item() == pytest.approx(focal / count, rel=1e-4)
    assert losses["bbox_regression"].item() == pytest.approx(giou / count, rel=1e-4)
    assert losses["bbox_ctrness"].item() == pytest.approx(bce / count, rel=1e-4)


def test_fcos_distances_and_centerness_follow_torchvisions_order() -> None:
    view = random_detector("fcos").view(padded_batch())
    boxes, central = view.net.head.regression_head(list(view.neck.values()))
    for maps, flat in ((view.deltas, boxes), (view.centerness, central)):
        offset = 0
        for stride, x in maps.items():
            rows = x.flatten(2).transpose(1, 2)
            assert x.shape[1] == flat.shape[2]
            assert x.shape[2:] == view.neck[stride].shape[2:]
            assert torch.equal(rows, flat[:, offset : offset + rows.shape[1]])
            offset += rows.shape[1]
        assert offset == flat.shape[1]
    assert min(x.min() for x in view.deltas.values()) >= 0


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_anchors_move_to_the_objects_by_their_targets(family: str) -> None:
    """Every positive's decoded target is a box of its image, of its label where the head tells classes."""
    view = random_detector(family).view(padded_batch())
    targets = view.anchor_targets
    boxes = view.anchor_boxes(targets.deltas)
    count = 0
    for image, row in (targets.labels > 0).nonzero().tolist():
        own, label = view.batch.targets[image], int(targets.labels[image, row])
        (index,) = [
            index for index, box in enumerate(own.boxes) if torch.allclose(box, boxes[image, row], rtol=0, atol=1e-3)
        ]
        assert "rois" in view.spec.outputs or int(own.labels[index]) == label
        count += 1
    assert count > 5
    assert boxes.shape == (3, sum(map(len, view.anchors.values())), 4)


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_gradient_flows_through_moved_anchors_and_a_frozen_view_has_none(family: str) -> None:
    detector = random_detector(family)
    for frozen in (False, True):
        view = detector.view(padded_batch(), frozen=frozen)
        flat = [x.permute(0, 2, 3, 1).reshape(3, -1, 4) for x in view.deltas.values()]
        boxes = view.anchor_boxes(torch.cat(flat, dim=1))
        assert boxes.requires_grad is not frozen
        assert boxes.dtype == torch.float32
        assert view.anchor_boxes(torch.cat(flat, dim=1).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_dense_outputs_are_float32_under_autocast(family: str) -> None:
    detector = random_detector(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = detector.view(padded_batch())
        dense = [view.deltas, view.objectness if "rois" in view.spec.outputs else view.class_logits]
        dense += [view.centerness] if "centerness" in view.spec.outputs else []
        boxes = view.predictions()[0].boxes
    assert {x.dtype for maps in dense for x in maps.values()} == {torch.float32}
    assert boxes.dtype == torch.float32


def test_padding_is_zero_after_normalisation() -> None:
    mean, std = (0.1, 0.4, 0.9), (0.5, 0.2, 1.0)
    data, view = padded_batch(), random_detector("retinanet", mean=mean, std=std).view(padded_batch())
    for index, (height, width) in enumerate(SIZES):
        for channel in range(3):
            image = view.images[index, channel]
            expected = (data.images[index, channel, :height, :width].double() / 255 - mean[channel]) / std[channel]
            assert torch.allclose(image[:height, :width].double(), expected, atol=1e-6)
            assert not image[height:].any()
            assert not image[:, width:].any()


def test_the_input_must_not_be_normalised_already() -> None:
    data = padded_batch()
    with pytest.raises(DistillError, match="uint8"):
        random_detector("retinanet").view(Batch(data.images.float(), data.sizes, data.sizes, data.targets, data.ids))


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_teacher_stays_out_of_autograd_but_can_be_compared_with(family: str) -> None:
    student, teacher, data = random_detector(family), random_detector(family, seed=1), padded_batch()
    views = student.view(data), teacher.view(data, frozen=True, seed=2)
    assert not any(x.requires_grad for x in (*views[1].neck.values(), *views[1].losses.values()))
    boxes = views[1].rois.boxes if family == "faster_rcnn" else [target.boxes for target in data.targets]
    product = views[0].roi_features(boxes) * views[1].roi_features(boxes)
    (product.sum() + (views[0].neck[16] * views[1].neck[16]).sum()).backward()
    assert student.net.backbone.body["conv1"].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_seeded_view_leaves_the_global_stream_alone() -> None:
    data = padded_batch()
    few = {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 8}
    student, teacher = random_detector("faster_rcnn", **few), random_detector("faster_rcnn", seed=1, **few)
    torch.manual_seed(0)
    alone = student.view(data).losses
    torch.manual_seed(0)
    guest = teacher.view(data, frozen=True, seed=4)
    drawn, _ = guest.rois.boxes, guest.losses
    assert_same(student.view(data).losses, alone)

    def sample(seed: int) -> Tensor:
        return torch.cat(teacher.view(data, frozen=True, seed=seed).rois.boxes)

    assert torch.equal(sample(4), torch.cat(list(drawn)))
    assert not torch.equal(sample(4), sample(5))


def test_training_is_a_fact_of_the_view() -> None:
    detector = random_detector("faster_rcnn", rpn_pre_nms_top_n_test=5, rpn_post_nms_top_n_test=3)
    data = padded_batch()
    for mode in (True, False):
        detector.train(mode)
        assert max(len(boxes) for boxes in detector.view(data, training=False).proposals) == 3
        assert max(len(boxes) for boxes in detector.view(data, training=True).proposals) > 3
        assert detector.net.rpn.training is mode


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_thresholds_can_be_given_and_do_not_stay(family: str) -> None:
    detector, data = random_detector(family, score_thresh=0.3, detections_per_img=10_000), padded_batch()
    view = detector.view(data, training=False)
    default = view.predictions()
    assert not any(len(image.boxes) for image in view.predictions(score=1.0))
    assert sum(len(image.boxes) for image in view.predictions(score=0.0)) > sum(len(image.boxes) for image in default)
    assert max(len(image.boxes) for image in view.predictions(score=0.0, top=2)) == 2
    assert sum(len(f.boxes) for f in view.predictions(nms=0.99)) > sum(len(f.boxes) for f in default)
    for again, first in zip(view.predictions(), default, strict=True):
        assert torch.equal(again.scores, first.scores)
        assert (first.scores > 0.3).all()
        assert first.labels.min() >= 1


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_detections_are_in_the_original_pixels(family: str) -> None:
    data, originals = padded_batch(), ((192, 32), (140, 300), (128, 90))
    data = Batch(data.images, data.sizes, originals, data.targets, data.ids)
    view = random_detector(family).view(data, training=False)
    for image, resized, (h, w), (height, width) in zip(
        view.detections, view.predictions(), originals, data.sizes, strict=True
    ):
        expected = resized.boxes * torch.tensor([w / width, h / height, w / width, h / height])
        assert torch.allclose(image.boxes, expected)


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_region_is_pooled_from_the_level_of_its_size(family: str) -> None:
    """Lin et al. 2017, eq. 1: level floor(4 + log2(side / 224)), within the levels that are pooled from."""
    detector = random_detector(family)
    data = padded_batch(sizes=((64, 64), (2048, 2048)))
    view = detector.view(data)
    view.__dict__["neck"] = {
        stride: torch.full((2, 2, math.ceil(2048 / stride), math.ceil(2048 / stride)), float(stride))
        for stride in detector.spec.neck
    }
    sides = [16.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 895.0, 897.0, 1791.0, 1793.0]
    boxes = [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, side, side] for side in sides])]
    finest, coarsest = min(detector.spec.neck), 32 if family == "faster_rcnn" else 128
    expected = [min(max(2 ** math.floor(4 + math.log2(side / 224)), finest), coarsest) for side in sides]
    assert max(expected) == coarsest
    pooled = view.roi_features(boxes)
    assert pooled.shape == (len(sides), 2, 7, 7)
    assert torch.allclose(pooled, torch.tensor(expected, dtype=torch.float32).view(-1, 1, 1, 1).expand_as(pooled))


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_logits_follow_torchvisions_order_without_the_unused_label(family: str) -> None:
    detector, data = random_detector(family), padded_batch()
    view = detector.view(data)
    flat = detector.net.head.classification_head(list(view.neck.values()))  # (B, HWA, K+1)
    offset = 0
    for stride, logits in view.class_logits.items():
        count, (height, width) = detector.spec.anchors[stride], logits.shape[-2:]
        assert logits.shape[1] == count * 3
        for y, x, anchor, k in ((0, 0, 0, 0), (height - 1, width - 1, count - 1, 2), (0, width - 1, count // 2, 1)):
            row = offset + (y * width + x) * count + anchor
            assert torch.equal(logits[:, anchor * 3 + k, y, x], flat[:, row, k + 1])
        offset += height * width * count


@pytest.mark.parametrize(
    ("family", "stage"),
    [(family, name) for family in ("retinanet", "fcos") for name in ("objectness", "proposals", "rois")]
    + [("faster_rcnn", "class_logits"), ("faster_rcnn", "centerness"), ("retinanet", "centerness")],
)
def test_a_stage_that_a_family_lacks_says_what_to_change(family: str, stage: str) -> None:
    with pytest.raises(DistillError, match=rf"view\.{stage}: the detector is a {family}, which has no {stage}\. \w+"):
        getattr(random_detector(family).view(padded_batch()), stage)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_region_logits_need_two_stages(family: str) -> None:
    with pytest.raises(DistillError, match="two-stage"):
        random_detector(family).view(padded_batch()).roi_logits([torch.zeros(1, 4)] * 3)


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_batch_without_any_box_keeps_every_parameter_attached(family: str) -> None:
    data = padded_batch()
    empty = tuple(Target(target.boxes[:0], target.labels[:0]) for target in data.targets)
    detector = random_detector(family)
    losses = detector.view(Batch(data.images, data.sizes, data.sizes, empty, data.ids)).losses
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert not [name for name, p in detector.named_parameters() if p.grad is None]


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_a_whole_bfloat16_teacher_gives_float32_geometry(family: str) -> None:
    view = random_detector(family).bfloat16().view(padded_batch(), frozen=True)
    assert view.neck[16].dtype == torch.bfloat16
    assert view.roi_features([target.boxes for target in padded_batch().targets]).dtype == torch.bfloat16
    assert {image.boxes.dtype for image in view.predictions()} == {torch.float32}
    assert all(value.isfinite() for value in view.losses.values())


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_training_works_after_evaluation_in_inference_mode(family: str) -> None:
    """Lightning evaluates in inference mode, before the first step too; nothing of it may be kept."""
    detector, data = random_detector(family), padded_batch()
    with torch.inference_mode():
        assert detector.view(data, training=False).detections
    copy.deepcopy(detector)
    sum(detector.view(data).losses.values()).backward()
    assert gradients(detector)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_as_many_predictions_as_are_asked_for(family: str) -> None:
    """torchvision's unused label, which scores high in a fresh model, takes no place among them."""
    detector = random_detector(family)
    layer = detector.net.head.classification_head.cls_logits
    with torch.no_grad():
        layer.bias.view(-1, 4)[:, 0] = 5.0
    images = detector.view(padded_batch()).predictions(score=0.0, nms=0.9, top=40)
    assert [len(image.boxes) for image in images] == [40, 40, 40]
    assert all((image.labels > 0).all() for image in images)
