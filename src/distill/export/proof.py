"""The proof of an export: the file's detections, AP, size and latency beside those of the student."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.diagnostics.cost import device_name
from distill.evaluation.evaluate import Evaluation, MetricFactory
from distill.export.parity import Parity, compare_detections
from distill.progress import track
from distill.types import Detections, DistillError

PARITY_IMAGES = 16
"""Images whose detections are compared one by one."""
WARMUP = 2
PATIENCE = 20.0
"""Seconds after which the measurement of latency ends, also with fewer images."""

MAIN = ("AP", "mAP")
"""Main metric of COCO and of Pascal VOC. The first one that was measured decides whether an export loses too much."""

Detect = Callable[[Tensor], Detections]
"""From an image (3, H, W) uint8 to its detections, in its pixels."""


@dataclass(frozen=True)
class Latency:
    """Time from an image's pixels to its detections, one image at a time, in milliseconds."""

    threads: int
    median: float
    p95: float


@dataclass(frozen=True)
class ProgramRow:
    """A program in the table of a proof."""

    name: str
    results: dict[str, float]
    """Metrics by name, from 0 to 1, on the compared images."""
    megabytes: float
    """Size of its files, in millions of bytes."""
    latency: list[Latency]

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """Texts of the row: name, metrics in percent, MB, and milliseconds by number of threads."""
        times = [f"{value:.1f}" for spread in self.latency for value in (spread.median, spread.p95)]
        found = (self.results.get(name, -1.0) for name in metrics)
        return [
            self.name,
            *(f"{100 * value:.1f}" if value >= 0 else "–" for value in found),
            f"{self.megabytes:.1f}",
            *times,
        ]


@dataclass(frozen=True)
class Proof:
    """How an exported file compares with the student."""

    images: int
    """Number of images of both evaluations."""
    split: str
    device: str
    parity: Parity
    student: ProgramRow
    exported: ProgramRow

    @property
    def metric(self) -> str:
        """The metric that decides, a name in `MAIN`.

        Raises:
            DistillError: none of them was measured.
        """
        metric = next((name for name in MAIN if name in self.student.results), None)
        if metric is None:
            raise DistillError(
                f"export: expected a metric {' or '.join(MAIN)} (metrics=coco or voc), but the run measures "
                f"{', '.join(self.student.results)}"
            )
        return metric

    @property
    def loss(self) -> float:
        """The student's metric minus the file's, in percentage points."""
        return 100 * (self.student.results[self.metric] - self.exported.results[self.metric])

    def to_plain(self) -> dict[str, Any]:
        """The proof in plain containers."""
        return asdict(self)


def spread(count: int, limit: int) -> list[int]:
    """Up to `limit` of the numbers below `count`, evenly spread, with the first and the last one."""
    chosen = min(limit, count)
    return [round(place * (count - 1) / max(1, chosen - 1)) for place in range(chosen)]


class ValidationImages:
    """Original images of a split with their ids, evenly spread over the split.

    Args:
        data: the data.
        split: the split.
        limit: largest number of images; None: all.
        option: the option of `distill export` that gives `limit`, for the message.

    Raises:
        DistillError: there is no image, because the split is empty or `limit` is below 1.
    """

    def __init__(self, data: DetectionData, split: str, limit: int | None = None, option: str = "--images") -> None:
        self.data, self.split = data, split
        self.dataset = data.dataset(split, training=False)
        count = len(self.dataset)
        limit = count if limit is None else limit
        if not count or limit < 1:
            raise DistillError(f"{option} {limit}: expected at least one image of {split}, which has {count}")
        self.indices = spread(count, limit)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the id and the pixels (3, H, W) of each image."""
        for index in self.indices:
            yield int(self.dataset.ids[index]), self.dataset.load(self.dataset.files.text(index))


def evaluate_program(
    classes: Any,
    detect: Detect,
    images: ValidationImages,
    metrics: Sequence[MetricFactory],
    bar: str | None = None,
    kept: list[Detections] | None = None,
) -> dict[str, float]:
    """Metrics of a program on original images, by the evaluator of all detectors.

    Args:
        classes: a detector or an exported one, for its class names.
        detect: the program.
        images: the evaluated images. The ground truth of other images in the split is ignored.
        metrics: factories of the metrics.
        bar: caption of a progress bar; None for no bar.
        kept: list to which the detections of the first `PARITY_IMAGES` images are added.
    """
    data, device = images.data, torch.device("cpu")
    truth = data.ground_truth(images.split)
    evaluation = Evaluation(classes, truth, data.classes, metrics, device, seen_only=len(images) < len(truth["images"]))
    for image_id, pixels in track(images, bar):
        found = detect(pixels)
        if kept is not None and len(kept) < PARITY_IMAGES:
            kept.append(found)
        evaluation.add_detections([image_id], [found])
    return evaluation.compute()


def measure_latency(detect: Detect, images: Sequence[Tensor], threads: int) -> Latency:
    """Time a program on images in memory, one at a time."""
    for image in [images[0]] * WARMUP:
        detect(image)
    times, start = [], time.monotonic()
    for image in images:
        before = time.perf_counter()
        detect(image)
        times.append(1000 * (time.perf_counter() - before))
        if time.monotonic() - start > PATIENCE:
            break
    return Latency(threads, float(np.median(times)), float(np.percentile(times, 95)))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's number of threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def detect_by(detector: Detector) -> Detect:
    """A detector as a program. It resizes as it did in training."""

    def detect(image: Tensor) -> Detections:
        (found,) = detector([image])
        return Detections(found.boxes, found.scores, found.labels, found.masks)

    return detect


def prove(
    student: Detector,
    open_program: Callable[[int], Detect],
    name: str,
    files: Sequence[Path],
    images: ValidationImages,
    metrics: Sequence[MetricFactory],
    student_megabytes: float,
    timed: int = 24,
) -> Proof:
    """Compare an exported program with the student on the same images.

    Args:
        student: the student, on the CPU.
        open_program: opens the exported program with a number of threads; 0: all.
        name: name of the program in the table.
        files: the files of the program.
        images: the images of the evaluation; the first ones are compared one by one.
        metrics: factories of the metrics.
        student_megabytes: size of the student's weights.
        timed: number of images whose latency is measured; 0: no latency.
    """
    ours: list[Detections] = []
    found: list[Detections] = []
    own = detect_by(student)
    expected = evaluate_program(student, own, images, metrics, "student", ours)
    results = evaluate_program(student, open_program(1), images, metrics, name, found)
    in_memory = [pixels for _, (_, pixels) in zip(range(timed), images, strict=False)]
    cores = os.cpu_count() or 1
    latency: dict[str, list[Latency]] = {"student": [], name: []}
    for threads in sorted({1, cores}) if timed else ():
        with torch_threads(threads):
            latency["student"].append(measure_latency(own, in_memory, threads))
            latency[name].append(measure_latency(open_program(threads), in_memory, threads))
    size = sum(file.stat().st_size for file in files) / 1e6
    return Proof(
        len(images),
        images.split,
        device_name(torch.device("cpu")).partition(",")[0],
        compare_detections(ours, found),
        ProgramRow("student", expected, student_megabytes, latency["student"]),
        ProgramRow(name, results, size, latency[name]),
    )
