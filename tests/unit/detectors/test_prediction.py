"""Detections in images of all kinds: a detector that is called, and `distill.predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import distill
from distill.evaluation.predict import predict
from distill.types import DistillError
from helpers.training import small_detector


@pytest.fixture(scope="module")
def detector() -> Any:
    return small_detector().eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_kind_of_image_gives_the_same(detector: Any, image: torch.Tensor, tmp_path: Path) -> None:
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "x.png")
    kinds = [image, image.float() / 255, array, Image.fromarray(array), tmp_path / "x.png", str(tmp_path / "x.png")]
    first, *others = detector(kinds, score=0.05)
    assert len(first.scores) > 0
    for other in others:
        assert torch.equal(other.boxes, first.boxes)
        assert torch.equal(other.scores, first.scores)
        assert other.names == [detector.classes[label - 1] for label in first.labels.tolist()]


def test_boxes_are_in_pixels_of_the_given_image(detector: Any, image: torch.Tensor) -> None:
    """The detector sees 64x85 px. A box of the whole image ends at 120, 90."""
    boxes = predict(detector, [image], score=0.0)[0].boxes
    assert 64 < boxes[:, 3].max() <= 90
    assert 85 < boxes[:, 2].max() <= 120


def test_batches_of_mixed_sizes_keep_the_order(detector: Any, image: torch.Tensor) -> None:
    images = [image, image[:, :, :60], image.flip(2), image[:, :40], image.flip(1)]
    alone = [predict(detector, [each])[0] for each in images]
    together = detector(images, score=0.05, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.boxes, other.boxes, atol=1e-3)
        assert torch.allclose(one.scores, other.scores, atol=1e-5)


def test_a_score_leaves_out_the_rest(detector: Any, image: torch.Tensor) -> None:
    everything = predict(detector, [image], score=0.0)[0].scores
    limit = float(everything.median())
    assert predict(detector, [image], score=limit)[0].scores.tolist() == everything[everything >= limit].tolist()


def test_the_detector_is_left_as_it_was(image: torch.Tensor) -> None:
    detector = small_detector()
    assert detector.training
    detector([image])
    assert detector.training
    with pytest.raises(DistillError, match="image 1: expected"):
        detector([image, 7])
    assert detector.training


def test_a_call_equals_predict_and_records_no_gradient(detector: Any, image: torch.Tensor) -> None:
    (called,), (predicted,) = detector([image]), predict(detector, [image], score=0.0)
    assert torch.equal(called.boxes, predicted.boxes)
    assert not called.scores.requires_grad


def test_a_run_is_loaded_with_its_resize(detector: Any, image: torch.Tensor, tmp_path: Path) -> None:
    distill.save_student(detector, tmp_path, {"resize": {"antialias": True, "pad_to": 64}})
    assert torch.equal(distill.predict(tmp_path, [image])[0].boxes, predict_with(detector, image, True, 64))
    assert not torch.equal(predict(detector, [image])[0].boxes, predict_with(detector, image, True, 64))


@pytest.mark.parametrize("resize", [{"antialias": 1}, {"pad_to": 0}, {"pad": 32}, ["pad_to"]])
def test_an_invalid_resize_is_named(resize: Any, detector: Any, tmp_path: Path) -> None:
    distill.save_student(detector, tmp_path, {"resize": resize})
    with pytest.raises(DistillError, match=r"student.json of .*: expected 'resize'"):
        distill.load_detector(tmp_path)


def predict_with(detector: Any, image: torch.Tensor, antialias: bool, pad_to: int) -> torch.Tensor:
    from distill.data.transforms import Sample, Transform, collate
    from distill.types import Target

    transform = Transform((64,), 64, antialias=antialias)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = collate([Sample(transform.resize(image), empty, (90, 120), 0)], pad_to)
    found = detector.view(batch, training=False, frozen=True).detections[0]
    boxes: torch.Tensor = found.boxes[found.scores >= 0.05]
    return boxes
