"""The option `input_stride`: the network sees a smaller image, and all numbers stay in pixels of the image."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.detectors import registry, student_files
from distill.imaging.resizing import average_squares
from distill.types import Batch, Detections, DistillError, Target
from helpers.detectors import FAMILIES, random_detector

BOXES = torch.tensor([[4.0, 6, 30, 40], [20, 10, 60, 50], [1, 1, 12, 9]])
LABELS = torch.tensor([1, 3, 2])


def images(factor: int) -> Batch:
    """One image of 64 x 96 pixels and its boxes and masks, all enlarged by a factor without any new detail."""
    small = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = torch.zeros(3, 60, 90, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = Target(factor * BOXES, LABELS, repeated(masks, factor))
    size = (factor * 60, factor * 90)
    return Batch(repeated(small, factor), (size,), (size,), (target,), (1,))


def repeated(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def pair(family: str, factor: int) -> tuple[Any, Any]:
    """A detector of small images, and one of enlarged images whose network sees the same pixels."""
    detectors = []
    for scale in (1, factor):
        options: dict[str, Any] = {} if family == "fcos" else {"rounded": False, "sizes": sizes(family, scale)}
        detectors.append(
            random_detector(
                family,
                input_stride=scale,
                score_thresh=0.0,
                detections_per_img=30,
                **({"anchors": options} if options else {}),
            )
        )
    detectors[1].net.load_state_dict(detectors[0].net.state_dict())
    return detectors[0], detectors[1]


def sizes(family: str, scale: int) -> list[list[int]]:
    return [[scale * 8 * 2**level] for level in range(5)]


@pytest.mark.parametrize("factor", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_enlarged_image_gives_enlarged_boxes(family: str, factor: int) -> None:
    """The oracle is the same network on the small image."""
    small, large = pair(family, factor)
    found: list[Detections] = [
        detector.eval().view(images(scale), training=False, frozen=True).detections[0]
        for detector, scale in ((small, 1), (large, factor))
    ]
    assert len(found[0].boxes) > 10
    assert torch.equal(found[0].labels, found[1].labels)
    assert torch.allclose(found[0].scores, found[1].scores, atol=1e-6)
    assert torch.allclose(factor * found[0].boxes, found[1].boxes, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_are_those_of_the_small_image(family: str) -> None:
    losses = [
        detector.train().view(images(scale), training=True, seed=5).losses
        for detector, scale in zip(pair(family, 2), (1, 2), strict=True)
    ]
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        if name != "loss_mask":  # the target of a mask is sampled at other places of the larger mask
            assert losses[1][name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert all(value > 0 for value in losses[0].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_strides_count_pixels_of_the_image(family: str) -> None:
    small, large = pair(family, 2)
    assert [2 * stride for stride in small.spec.neck] == list(large.spec.neck)
    assert [2 * stride for stride in small.spec.body] == list(large.spec.body)
    view = large.eval().view(images(2), training=False, frozen=True)
    assert {stride: x.shape[-2:] for stride, x in view.neck.items()} == {
        stride: (-(-128 // stride), -(-192 // stride)) for stride in large.spec.neck
    }


def test_torchvisions_own_forward_pass_sees_the_small_image_too() -> None:
    _, large = pair("faster_rcnn", 2)
    x = torch.rand(1, 3, 128, 192)
    body = large.net.backbone.body
    assert torch.equal(next(iter(body(x).values())), body.maps(x)[0])


def test_squares_at_the_border_average_the_pixels_they_have() -> None:
    x = torch.arange(15.0).view(1, 1, 3, 5)
    expected = [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    assert average_squares(x, 2)[0, 0].tolist() == expected
    assert average_squares(x, 1) is x


def test_it_is_stored_and_weights_of_another_stride_are_refused(tmp_path: Any) -> None:
    _, large = pair("retinanet", 2)
    student_files.save_student(large, tmp_path)
    assert registry.load_detector(tmp_path).spec == large.spec
    with pytest.raises(DistillError, match=r"made for input_stride=2 \(here 1\)"):
        random_detector("retinanet", weights=str(tmp_path / "student.pt"), anchors=large.options["anchors"])
    file = tmp_path / "student.json"
    described = json.loads(file.read_text())
    del described["model"]["input_stride"]  # as in a run of an older version
    file.write_text(json.dumps(described))
    with pytest.raises(DistillError, match=r"input_stride=1 \(here 4\)"):
        random_detector("retinanet", weights=str(tmp_path / "student.pt"), input_stride=4)


@pytest.mark.parametrize("value", [0, 3, -2, True, 1.0, 2.0, "2", None, [2]])
@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_other_values_are_refused(family: str, value: Any) -> None:
    """True is equal to 1, and 2.0 to 2."""
    with pytest.raises(DistillError, match=re.escape(f"input_stride: expected 1, 2, 4, got {value!r}")):
        random_detector(family, input_stride=value)
