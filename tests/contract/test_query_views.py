"""The Views of set-prediction detectors: equal to transformers bit for bit, lazy, the same in any reading order."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.detectors.set_prediction import SetPredictionDetector
from distill.types import Batch, DistillError, QueryPoints, Target
from helpers.detectors import (
    QUERY_FAMILIES,
    assert_order_changes_nothing,
    assert_same,
    gradients,
    query_batch,
    query_detector,
    square_batch,
)

pytest.importorskip("transformers", reason="the extra detr is not installed")

LITE = {
    **{"backbone": {"name": "hgnet_pico", "width": 0.25}, "encoder": "lite", "gateway": False},
    **{"share_box_head": True, "corner_losses": False},
}
"""Options of the lite sizes of DEIMv2."""
KINDS = [
    pytest.param("rtdetr", {"version": 1}, id="rtdetr-1"),
    pytest.param("rtdetr", {"version": 2}, id="rtdetr-2"),
    pytest.param("dfine", {}, id="dfine"),
    pytest.param(
        "dfine",
        {"backbone": {"name": "hgnet_b0", "width": 0.25}, "strides": [16, 32], "decoder_points": [2, 3]},
        id="dfine-two-levels",
    ),
    pytest.param("deimv2", {}, id="deimv2"),
    pytest.param(
        "deimv2",
        {"backbone": {"name": "hgnet_b0", "width": 0.25}, "strides": [8, 16, 32], "decoder_points": [2, 3, 1]},
        id="deimv2-three-levels",
    ),
    pytest.param("deimv2", LITE, id="deimv2-lite"),
    pytest.param("rfdetr", {}, id="rfdetr"),
    pytest.param("rfdetr", {"positions": 6}, id="rfdetr-interpolated"),  # the trained position codes are resized
]


def without_boxes(data: Batch) -> Batch:
    return replace(data, targets=tuple(Target(target.boxes[:0], target.labels[:0]) for target in data.targets))


@pytest.mark.parametrize(("family", "options"), KINDS)
def test_losses_and_gradients_equal_the_librarys_bit_for_bit(family: str, options: dict[str, Any]) -> None:
    """In training mode, with denoising queries or groups and dropout, and with the statistics of all norms."""
    row = QUERY_FAMILIES[family]
    detector, data = query_detector(family, criterion="library", **row.random, **options), query_batch(family)
    reference = copy.deepcopy(detector.net)
    torch.manual_seed(7)
    view: Any = detector.view(data)
    sum(view.library_terms.values()).backward()
    torch.manual_seed(7)
    expected = reference(view.images, labels=view.labels)
    expected.loss.backward()
    assert row.groups or view.denoising is not None
    if not row.groups:  # there, the library's terms have no weights
        assert list(view.library_terms) == list(expected.loss_dict)
        assert_same(view.library_terms, expected.loss_dict)
    assert set(view.library_terms) == {name for name in expected.loss_dict if not name.startswith("cardinality")}
    assert torch.equal(sum(view.library_terms.values()), expected.loss)
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert_same(gradients(detector), theirs)
    assert len(theirs) > 100
    assert_same(dict(detector.net.named_buffers()), dict(reference.named_buffers()))
    assert torch.isclose(sum(view.losses.values()), expected.loss, rtol=1e-6)


@pytest.mark.parametrize(("family", "options"), KINDS)
def test_detections_equal_the_librarys_bit_for_bit(family: str, options: dict[str, Any]) -> None:
    import transformers

    row = QUERY_FAMILIES[family]
    detector, data = query_detector(family, detections_per_img=20, **options).eval(), query_batch(family)
    view = detector.view(data, training=False, frozen=True)
    with torch.no_grad():
        outputs = detector.net(view.images)
    sizes, processor = torch.tensor(data.original_sizes), getattr(transformers, row.processor)()
    pixels = processor(list(data.images), do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(view.images, pixels, rtol=0, atol=1e-6)
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for actual, other in zip(view.detections, expected, strict=True):
        assert len(actual.boxes) == 20
        assert torch.equal(actual.boxes, other["boxes"])
        assert torch.equal(actual.scores, other["scores"])
        assert torch.equal(actual.labels - 1, other["labels"])
    dense = torch.cat([x.flatten(2).transpose(1, 2) for x in view.class_logits.values()], dim=1)
    if row.groups:  # there, the library gives the scores of the best cells only
        dense = dense.gather(1, dense.amax(dim=2).topk(20).indices[..., None].expand(-1, -1, 3))
    assert torch.equal(dense, outputs.enc_outputs_class)
    assert {stride: tuple(x.shape[2:]) for stride, x in view.class_logits.items()} == {
        stride: (row.images[0] // stride, row.images[1] // stride) for stride in detector.spec.neck
    }


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_the_own_criterion_gives_every_layer_a_gradient(family: str) -> None:
    """transformers' loss of D-FINE and DEIMv2 has no term for the ordinary queries of the second-to-last layer."""
    detector, data = query_detector(family), query_batch(family)
    view: Any = detector.view(data, seed=1)
    layers = view._layers if QUERY_FAMILIES[family].groups else view.queries
    kept = [x for layer in layers for x in layer[:4] if x is not None]
    for x in kept:
        x.retain_grad()
    sum(view.losses.values()).backward()
    assert len(layers) == 3
    assert all((layer.corners is not None) == QUERY_FAMILIES[family].corners for layer in layers)
    for layer in layers:
        assert layer.logits.grad.abs().sum() > 0
        assert layer.boxes.grad.abs().sum() > 0
        if layer.corners is not None:
            assert layer.corners.grad.abs().sum() > 0
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", QUERY_FAMILIES)
@pytest.mark.parametrize(("criterion", "boxes"), [("own", False), ("library", False), ("library", True)])
def test_no_parameter_is_left_without_a_gradient(family: str, criterion: str, boxes: bool) -> None:
    """Also not by a batch without any box, because DDP expects a gradient of every weight."""
    detector, data = query_detector(family, criterion=criterion), query_batch(family)
    losses = detector.view(data if boxes else without_boxes(data)).losses
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_reading_order_changes_nothing(family: str) -> None:
    assert_order_changes_nothing(query_detector(family, **QUERY_FAMILIES[family].random), query_batch(family))


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_a_seeded_view_leaves_the_global_stream_alone(family: str) -> None:
    detector, data = query_detector(family, **QUERY_FAMILIES[family].random), query_batch(family)
    before = torch.get_rng_state()
    losses = [sum(detector.view(data, seed=seed).losses.values()) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_only_what_is_read_is_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, calls = QUERY_FAMILIES[family], dict.fromkeys(("body", "encoder", "scores", "boxes", "decoder"), 0)
    detector = query_detector(family)

    def counting(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return forward(*args, **kwargs)

        return run

    for name, path in zip(calls, row.parts, strict=True):
        part = detector.net.get_submodule(path)
        monkeypatch.setattr(part, "forward", counting(name, part.forward))
    view, ran = detector.view(query_batch(family)), []
    for stage in ("body", "neck", "class_logits", *["query_points"][: row.any_points], "queries", "losses"):
        getattr(view, stage)
        ran.append([name for name, count in calls.items() if count])
    names = list(calls)
    assert ran == [names[:1], names[:2], names[:3], *[names[:4]][: row.any_points], names, names]
    if row.groups:  # there, the library scores cells and chooses the best of them in one function
        assert calls.pop("scores") > 0
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_a_frozen_view_gives_every_layer_and_changes_no_buffer(family: str) -> None:
    detector, data = query_detector(family).eval(), query_batch(family)
    buffers = {name: value.clone() for name, value in detector.net.named_buffers()}
    view = detector.view(data, frozen=True)
    layers = view.queries
    assert len(layers) == 3
    assert not any(x.requires_grad for layer in layers for x in layer if x is not None)
    assert_same(dict(detector.net.named_buffers()), buffers)
    assert not any(module.training for module in detector.net.modules())
    boxes = [target.boxes for target in data.targets]
    assert view.roi_features(boxes).shape == (6, 32, 7, 7)
    for image, (queries, objects) in enumerate(view.query_targets[0]):
        count = len(data.targets[image].labels)
        assert sorted(objects.tolist()) == list(range(count))
        assert len(set(queries.tolist())) == count


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_the_decoder_starts_from_any_points(family: str) -> None:
    """From its own it gives its own queries; a gradient reaches decoder and encoder from others, of any number."""
    detector, data = query_detector(family).eval(), query_batch(family)
    view = detector.view(data, training=False)
    if not QUERY_FAMILIES[family].any_points:
        for output in ("query_points", "decode"):
            with pytest.raises(DistillError, match=rf"view\.{output}: the detector is a {family}, which has no"):
                getattr(view, output)
        return
    for again, layer in zip(view.decode(view.query_points), view.queries, strict=True):
        torch.testing.assert_close(again.boxes, layer.boxes, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.logits, layer.logits, rtol=0, atol=1e-4)
    cells, boxes = view.query_points
    points = QueryPoints(cells.repeat(1, 2), boxes.flip(1).repeat(1, 2, 1))
    layers = view.decode(points)
    assert layers[-1].logits.shape == (3, 40, 3)
    layers[-1].logits.sum().backward()
    body = next(detector.body.parameters())
    assert body.grad is not None
    assert body.grad.abs().sum() > 0


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_boxes_are_float32_in_bfloat16(family: str) -> None:
    from distill.teacher import Teacher

    detector, data = query_detector(family), query_batch(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = detector.view(data)
        losses = view.losses
    assert view.neck[16].dtype == torch.bfloat16
    assert {x.dtype for layer in view.queries for x in layer if x is not None} == {torch.float32}
    assert {x.dtype for x in view.class_logits.values()} == {torch.float32}
    assert all(value.isfinite() for value in losses.values())
    exact = Teacher(detector, dtype="float32").view(data).queries[-1].boxes
    teacher = Teacher(detector, dtype="bfloat16")
    rounded = teacher.view(data)
    assert rounded.neck[16].dtype == torch.bfloat16
    assert next(teacher.optimized(torch.device("cpu")).net.model.decoder.parameters()).dtype == torch.float32
    assert rounded.queries[-1].boxes.dtype == torch.float32
    assert exact.shape == rounded.queries[-1].boxes.shape


@pytest.mark.parametrize(("family", "size"), [("rtdetr", (64, 160)), ("rfdetr", (96, 96))])
def test_training_works_after_evaluation_in_inference_mode(family: str, size: tuple[int, int]) -> None:
    """The library caches start boxes and position codes; tensors of inference mode must not be among them."""
    detector, data = query_detector(family), square_batch((size, size))
    with torch.inference_mode():
        assert detector.view(data, training=False).detections
    copy.deepcopy(detector)
    sum(detector.view(data).losses.values()).backward()
    assert gradients(detector)


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_thresholds_can_be_given(family: str) -> None:
    view = query_detector(family).view(query_batch(family), training=False)
    default = view.predictions()
    assert {len(image.boxes) for image in default} == {60}
    assert [len(image.boxes) for image in view.predictions(top=7)] == [7, 7, 7]
    middle = default[0].scores[10].item()
    assert len(view.predictions(score=middle)[0].boxes) == 11
    few = view.predictions(nms=0.3, top=5)
    assert all(len(image.boxes) <= 5 for image in few)
    assert all(image.labels.min() >= 1 and image.labels.max() <= 3 for image in default)


@pytest.mark.parametrize(
    "family", [x for x, y in QUERY_FAMILIES.items() if issubclass(y.detector, SetPredictionDetector)]
)
def test_numbers_that_are_too_low_are_refused(family: str) -> None:
    """Two layers are enough; with one, the library cannot tie the heads."""
    message = r"expected queries from 1 on, decoder_layers from 2 on, got queries=0, decoder_layers=1"
    with pytest.raises(DistillError, match=message):
        query_detector(family, decoder_layers=1, queries=0)
    assert len(query_detector(family, decoder_layers=2).eval().view(square_batch()).queries) == 2


def test_images_and_queries_that_do_not_fit_are_refused() -> None:
    detector = query_detector("rtdetr")
    with pytest.raises(DistillError, match=r"multiples of 32 pixels.*100 x 128.*data\.resize=square"):
        _ = detector.view(square_batch(((100, 128),))).neck
    with pytest.raises(DistillError, match=r"84 cells.*model\.queries=84"):
        _ = query_detector("rtdetr", queries=100).view(square_batch(((64, 64),))).queries
    with pytest.raises(DistillError, match=r"min_size, max_size: expected multiples of 32.*100 and 128"):
        query_detector("rtdetr", min_size=100)
    view = detector.view(square_batch())
    with pytest.raises(DistillError, match=r"view\.anchors: the detector is a rtdetr, which has no anchors"):
        _ = view.anchors


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "options"), KINDS)
def test_one_batch_can_be_learned_by_heart(family: str, options: dict[str, Any]) -> None:
    row = QUERY_FAMILIES[family]
    still = {"denoising": 0} if "denoising" in row.small else {}
    detector, data = query_detector(family, **still, **options), square_batch(((128, 128), (128, 128)))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=row.rate)
    for _ in range(600):  # D-FINE with two levels has an IoU of 0.36 after 250 steps, and 0.98 after 600
        optimizer.zero_grad()
        sum(detector.view(data).losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    found, truth = detector.view(data).predictions(top=3)[0], data.targets[0]
    from torchvision.ops import box_iou

    best = box_iou(truth.boxes, found.boxes).max(dim=1)
    assert best.values.min() > 0.7
    assert torch.equal(found.labels[best.indices], truth.labels)
    assert found.scores.min() > 0.5
