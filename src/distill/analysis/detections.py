"""The detections of a detector on a split, as arrays in original pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.evaluate import evaluate
from distill.evaluation.metric import DetectionArrays, DetectionMetric, GroundTruth


class _Recorder(DetectionMetric):
    """Keeps the ground truth and the detections instead of measuring them."""

    recorded: tuple[GroundTruth, DetectionArrays] | None = None

    def evaluate(self, truth: GroundTruth, detections: DetectionArrays) -> dict[str, float]:
        if self.recorded is None:  # a second call has the shared classes only
            self.recorded = truth, detections
        return {}


def record_detections(
    detector: Detector, data: DetectionData, split: str, device: torch.device, bar: str | None = None
) -> tuple[GroundTruth, DetectionArrays]:
    """Return the ground truth of a split and the detections of a detector, with the labels of the data.

    Args:
        detector: the detector. It keeps its mode and device.
        data: the data set.
        split: `train`, `val` or `test`.
        device: device of the detector.
        bar: caption of a progress bar; None for no bar.

    Raises:
        DistillError: detector and data share no class name.
    """
    recorders: list[_Recorder] = []

    def build(ground_truth: Mapping[str, Any], classes: Sequence[str]) -> DetectionMetric:
        recorders.append(_Recorder(ground_truth, classes))
        return recorders[0]

    evaluate(detector, data, split, [build], device, bar)
    recorded = recorders[0].recorded
    assert recorded is not None
    return recorded
