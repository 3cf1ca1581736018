"""Distribution heads: their functions by loops, their Views against torchvision's own forward pass, and exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.detectors.distribution import DistanceCoder, distribution_focal, expected_distances
from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_student
from distill.export.torchvision_code import torchvision_code
from distill.types import Batch, DistillError
from helpers.detectors import padded_batch, random_detector

OPTIONS: dict[str, dict[str, Any]] = {
    "retinanet": {"box_head": "distribution", "box_loss": "giou", "box_bins": 5},
    "fcos": {"box_head": "distribution", "box_bins": 5},
}


def detector_of(family: str, **options: Any) -> Any:
    detector = random_detector(family, **OPTIONS[family], **options)
    torch.nn.init.normal_(detector.net.head.regression_head.bbox_reg.weight, std=0.2)
    detector.net.head.classification_head.cls_logits.bias.data[::4] = -20.0  # torchvision's label 0 is never detected
    return detector


def torchvision_input(data: Batch) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = [x[:, :h, :w].float() / 255 for x, (h, w) in zip(data.images, data.sizes, strict=True)]
    return images, [{"boxes": target.boxes, "labels": target.labels} for target in data.targets]


def test_expected_distances_and_their_channels() -> None:
    """Channel (4 a + side) * bins + k: two anchors, bins 0, 1, 2."""
    logits = torch.randn(2, 2 * 4 * 3, 2, 3, dtype=torch.float64)
    found = expected_distances(logits, 3)
    assert found.shape == (2, 8, 2, 3)
    for image, anchor, side, row, column in ((0, 0, 0, 0, 0), (1, 1, 2, 1, 2), (0, 1, 3, 0, 1)):
        first = (4 * anchor + side) * 3
        e = [math.exp(logits[image, first + k, row, column]) for k in range(3)]
        expected = (e[1] + 2 * e[2]) / sum(e)
        assert found[image, 4 * anchor + side, row, column].item() == pytest.approx(expected)


@pytest.mark.parametrize(("true", "weights"), [(0.0, (1, 0, 0)), (0.25, (0.75, 0.25, 0)), (1.5, (0, 0.5, 0.5))])
def test_the_focal_loss_is_the_cross_entropy_with_both_neighbors(true: float, weights: tuple[float, ...]) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    log_p = [x - math.log(sum(map(math.exp, logits.tolist()))) for x in logits.tolist()]
    found = distribution_focal(logits.expand(1, 4, 3), torch.full((1, 4), true, dtype=torch.float64))
    assert found[0].tolist() == pytest.approx([-sum(w * x for w, x in zip(weights, log_p, strict=True))] * 4)


def test_distances_outside_of_the_bins_are_clamped() -> None:
    logits = torch.randn(1, 4, 3)
    for true, nearest in ((-3.0, 0.0), (9.0, 2.0)):
        found, expected = (distribution_focal(logits, torch.full((1, 4), value)) for value in (true, nearest))
        assert torch.equal(found, expected)


def test_the_unit_is_an_eighth_of_the_anchor() -> None:
    """The anchor is centered at (10, 20) and has an area of 32^2: the unit is 4 pixels."""
    anchor, box = torch.tensor([[10.0 - 32, 20 - 8, 10 + 32, 20 + 8]]), torch.tensor([[2.0, 8.0, 18.0, 40.0]])
    distances = DistanceCoder().encode_single(box, anchor)
    assert distances.tolist() == [[2.0, 3.0, 2.0, 5.0]]
    assert torch.equal(DistanceCoder().decode_single(distances, anchor), box)


@pytest.mark.parametrize("family", OPTIONS)
def test_a_view_computes_what_torchvisions_code_computes(family: str) -> None:
    """The layer returns deltas, so torchvision's own forward pass runs with it."""
    detector, data = detector_of(family), padded_batch()
    net = detector.net
    net.transform.resize = lambda image, target: (image, target)
    losses = detector.view(data).losses
    expected = net(*torchvision_input(data))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    assert set(losses) - set(expected) == {"bbox_distribution"}
    for actual, other in zip(
        detector.eval().view(data, training=False).detections, net.eval()(torchvision_input(data)[0]), strict=True
    ):
        keep = other["labels"] > 0
        assert keep.any()
        torch.testing.assert_close(actual.boxes, other["boxes"][keep], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", OPTIONS)
def test_the_distribution_loss_is_the_mean_over_positive_sides(family: str) -> None:
    """By image in a RetinaNet, over the batch in an FCOS; one image of three has no boxes."""
    detector, data = detector_of(family, distribution_weight=0.5), padded_batch()
    view = detector.view(data)
    targets, bins, anchors = view.anchor_targets, 5, next(iter(detector.spec.anchors.values()))
    rows = []
    for x in view.side_logits.values():
        by_anchor = x.view(len(x), anchors, 4, bins, *x.shape[2:]).permute(0, 4, 5, 1, 2, 3)
        rows.append(by_anchor.reshape(len(x), -1, 4, bins))
    logits, means, sums = torch.cat(rows, 1), [], []
    for image in range(3):
        positive = targets.labels[image] > 0
        error = distribution_focal(logits[image, positive], targets.deltas[image, positive]).mean(1)
        means.append(error.sum() / max(1, len(error)))
        sums.append(error)
    expected = torch.stack(means).mean() if family == "retinanet" else torch.cat(sums).mean()
    assert view.losses["bbox_distribution"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", OPTIONS)
def test_training_moves_the_boxes_to_the_truth(family: str) -> None:
    detector, data = detector_of(family), padded_batch(((96, 64),))
    optimizer = torch.optim.Adam(detector.net.head.parameters(), lr=1e-2)
    names, history = ("bbox_regression", "bbox_distribution"), []
    for _ in range(12):
        losses = detector.view(data).losses
        history.append([losses[name].item() for name in names])
        optimizer.zero_grad()
        (losses[names[0]] + losses[names[1]]).backward()
        optimizer.step()
    assert all(last < 0.9 * first for first, last in zip(history[0], history[-1], strict=True)), history


@pytest.mark.parametrize("family", OPTIONS)
def test_a_batch_without_boxes_has_an_attached_zero(family: str) -> None:
    data = padded_batch(((64, 64), (50, 60)))
    empty = data.__class__(data.images[1:], data.sizes[1:], data.original_sizes[1:], data.targets[1:], data.ids[1:])
    loss = detector_of(family).view(empty).losses["bbox_distribution"]
    assert loss.item() == 0
    assert loss.requires_grad


@pytest.mark.parametrize("family", OPTIONS)
def test_a_file_keeps_the_head_and_its_outputs(family: str, tmp_path: Path) -> None:
    detector, data = detector_of(family).eval(), padded_batch(((64, 64),))
    save_student(detector, tmp_path)
    again = load_detector(tmp_path)
    assert again.describe() == detector.describe()
    assert again.spec.side_bins == 5
    assert "side_logits" in again.spec.outputs
    for x, y in zip(detector.view(data).deltas.values(), again.view(data).deltas.values(), strict=True):
        assert torch.equal(x, y)


def test_half_precision_expects_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = detector_of("fcos").view(padded_batch(((64, 64),)))
        assert all(x.dtype == torch.float32 for x in (*view.side_logits.values(), *view.deltas.values()))
        assert view.losses["bbox_distribution"].dtype == torch.float32


def test_torchvisions_format_is_refused() -> None:
    with pytest.raises(DistillError, match=r"torchvision's classes do not have .*box_head=distribution"):
        torchvision_code(detector_of("retinanet"), "x.pt")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("retinanet", {"box_head": "distribution"}, "box_loss: with box_head=distribution, expected giou, diou, ciou"),
        ("retinanet", {"box_head": "other"}, "box_head: expected regression or distribution"),
        ("fcos", {"box_head": "distribution", "box_bins": 1}, "box_bins: expected a whole number from 2"),
        ("fcos", {"box_head": "distribution", "distances": "exp"}, "expected distances=relu and level_scales=false"),
        ("fcos", {"distribution_weight": -1.0}, "distribution_weight: expected a number from 0"),
        ("fcos", {"distribution_weight": "high"}, "distribution_weight: expected a number from 0, got 'high'"),
    ],
)
def test_options_that_do_not_fit_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        random_detector(family, **options)
