"""Evaluation of a detector on a sample of the validation images: its metrics and its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.evaluate import Evaluation, MetricFactory, ground_truth_of
from distill.types import Batch


def sample_batches(data: DetectionData, limit: int) -> Iterator[list[int]]:
    """Yield batches of indices of up to `limit` evenly spread validation images.

    All images of a batch have the same padded size.
    """
    count, sizes = len(data.records("val")), data.padded_sizes("val")
    chosen = {round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)} if count > limit else range(count)
    for _, group in groupby(sorted(chosen, key=lambda index: (sizes[index], index)), key=lambda index: sizes[index]):
        indices = list(group)
        yield from (indices[i : i + data.eval_batch_size] for i in range(0, len(indices), data.eval_batch_size))


def evaluate_sample(
    detector: Detector,
    data: DetectionData,
    metrics: Sequence[MetricFactory],
    device: torch.device,
    limit: int,
    patience: float = math.inf,
) -> dict[str, Any]:
    """Measure a detector's metrics, and the wall-clock seconds per image, on up to `limit` validation images.

    Detection ends after `patience` seconds. The detector is moved to the device, and keeps its mode.

    Returns:
        ``images``: number of measured images; ``detect``: seconds per image for loading and detection; ``metric``:
        seconds per image for the metrics; ``values``: the metrics.
    """
    training = detector.training
    detector.to(device).eval()
    results: list[tuple[Batch, Any]] = []
    start = time.perf_counter()
    for indices in sample_batches(data, limit):
        if time.perf_counter() - start > patience:
            break
        batch = data.load_batch("val", indices).to(device)
        results.append((batch, detector.view(batch, training=False, frozen=True).detections))
    synchronize(device)
    detected = time.perf_counter()
    detector.train(training)
    ids = [image for batch, _ in results for image in batch.ids]
    evaluation = Evaluation(detector, ground_truth_of(data.ground_truth("val"), ids), data.classes, metrics, device)
    for batch, detections in results:
        evaluation.add_detections(batch.ids, detections)
    values, count = evaluation.compute(), max(1, len(ids))
    seconds = {"detect": (detected - start) / count, "metric": (time.perf_counter() - detected) / count}
    return {"images": len(ids), **seconds, "values": values}


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
