"""The detections of a detector on a split, as arrays in original pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.evaluate import evaluate
from distill.evaluation.recording import DetectionRecorder, Recording


def record_detections(
    detector: Detector, data: DetectionData, split: str, device: torch.device, bar: str | None = None
) -> Recording:
    """Return the detections of a detector on a split, with the labels of the data, and the ground truth.

    Args:
        detector: the detector. It keeps its mode and device.
        data: the data set.
        split: `train`, `val` or `test`.
        device: device of the detector.
        bar: caption of a progress bar; None for no bar.

    Raises:
        DistillError: detector and data share no class name.
    """
    recorders: list[DetectionRecorder] = []

    def build(ground_truth: Mapping[str, Any], classes: Sequence[str]) -> DetectionRecorder:
        recorders.append(DetectionRecorder(ground_truth, classes))
        return recorders[-1]

    evaluate(detector, data, split, [build], device, bar)
    recording = recorders[-1].recording
    assert recording is not None
    return recording
