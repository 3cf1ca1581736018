"""The file of detections: what is written is what is read, and a damaged or newer one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.evaluation.coco import CocoMetric
from distill.evaluation.recording import DetectionRecorder, Recording, load_recording, save_recording
from distill.types import Detections, DistillError

TRUTH = {
    "images": [{"id": 7}, {"id": 9}],
    "annotations": [
        {"image_id": 9, "category_id": 2, "bbox": [1.5, 2, 10, 20], "iscrowd": 0},
        {"image_id": 9, "category_id": 1, "bbox": [3, 4, 5, 6], "iscrowd": 1},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 8, 8], "difficult": 1, "area": 50},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "größer"}],
}
CLASSES = ("cat", "größer")


def recorded(dtype: torch.dtype = torch.float32) -> Recording:
    recorder = DetectionRecorder(TRUTH, CLASSES)
    boxes = torch.tensor([[1.1, 2.2, 11.3, 22.4], [0.0, 0.0, 7.9, 8.1]], dtype=dtype)
    found = Detections(boxes, torch.tensor([0.9, 0.3], dtype=dtype), torch.tensor([2, 1]))
    recorder.update([9, 7], [found, Detections(boxes[:0], boxes[:0, 0], torch.zeros(0, dtype=torch.int64))])
    assert recorder.compute() == {}
    assert recorder.recording is not None
    return recorder.recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recording_survives_its_file(dtype: torch.dtype, tmp_path: Path) -> None:
    before = recorded(dtype)
    after = load_recording(save_recording(tmp_path / "detections" / "val.npz", before))
    assert after.classes == before.classes
    for ours, theirs in ((before.truth, after.truth), (before.detections, after.detections)):
        for name, column, other in zip(ours._fields, ours, theirs, strict=True):
            assert column.dtype == other.dtype, name
            np.testing.assert_array_equal(column, other, err_msg=name)
    metric = CocoMetric(TRUTH, CLASSES)
    assert metric.evaluate(after.truth, after.detections) == metric.evaluate(before.truth, before.detections)
    assert after.truth_digest() == before.truth_digest()


def test_another_ground_truth_has_another_digest() -> None:
    before = recorded()
    moved = before.truth._replace(box=before.truth.box + 1)
    assert Recording(CLASSES, moved, before.detections).truth_digest() != before.truth_digest()
    assert Recording(("dog", "größer"), before.truth, before.detections).truth_digest() != before.truth_digest()


def test_a_damaged_missing_or_newer_file_is_refused(tmp_path: Path) -> None:
    file = save_recording(tmp_path / "val.npz", recorded())
    content = dict(np.load(file))
    np.savez(tmp_path / "newer.npz", **content | {"format": np.array(2)})
    with pytest.raises(
        DistillError, match=r"newer\.npz: not the detections of a run .*this version of distill reads 1"
    ):
        load_recording(tmp_path / "newer.npz")
    file.write_bytes(file.read_bytes()[:100])
    for path in (file, tmp_path / "none.npz"):
        with pytest.raises(DistillError, match=f"{path.name}: not the detections of a run"):
            load_recording(path)


@pytest.mark.parametrize("content", [b"", b"xx", b"\x80\x04K\x01.", b"a" * 1000])
def test_nobody_is_told_to_load_a_pickle(content: bytes, tmp_path: Path) -> None:
    """numpy takes any file that is no archive for a pickle, and says how to load it unsafely."""
    file = tmp_path / "val.npz"
    file.write_bytes(content)
    with pytest.raises(DistillError, match="not the detections of a run") as caught:
        load_recording(file)
    assert "pickle" not in str(caught.value)
