"""Detections of a detector in images of any kind: tensors, arrays, PIL images and files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.data.pixels import as_tensor
from distill.data.transforms import Sample, Transform, collate
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.detectors.student_files import read_extra
from distill.types import Target


class Prediction(NamedTuple):
    """Detections in one image, best first, on the CPU."""

    boxes: Tensor
    """(N, 4) xyxy in pixels of the given image."""
    scores: Tensor
    """(N,) in [0, 1]."""
    labels: Tensor
    """(N,) from 1 to K."""
    names: list[str]
    """Class names of the N detections."""
    masks: Tensor | None = None
    """(N, H, W) bool, or None without a mask head."""


def predict(
    source: Detector | str | Path,
    images: Iterable[Any],
    score: float = 0.05,
    device: torch.device | str | None = None,
    batch_size: int = 1,
) -> list[Prediction]:
    """Detect objects in images.

    Args:
        source: a detector, or the path of a run folder, of its ``student.pt`` or of a checkpoint.
        images: tensors (3, H, W), arrays (H, W, 3), PIL images or paths of files; see `pixels.as_tensor`.
        score: lowest score of a detection. The detector itself has a limit, too (``model.score_thresh``).
        device: device of the computation; None: CUDA if available, else the CPU.
        batch_size: images that are computed together, if they have the same size after resize and padding. The results
            do not depend on this number, up to rounding.

    Returns:
        One prediction per image, in the order of the images.

    Raises:
        DistillError: the source or an image cannot be read.

    Example:
        `distill.predict("outputs/NAME/RUN", ["a.jpg"])[0].boxes`
    """
    if isinstance(source, Detector):
        detector, extra = source, {}
    else:
        detector, extra = load_detector(source), read_extra(Path(source))
    resize = {"antialias": False, "pad_to": 32} | extra.get("resize", {})
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transform = Transform((detector.options["min_size"],), detector.options["max_size"], antialias=resize["antialias"])
    results: dict[int, Prediction] = {}
    waiting: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    previous_device, previous_mode = next(detector.parameters()).device, detector.training
    detector.to(chosen).eval()

    def compute(samples: list[Sample]) -> None:
        batch = collate(samples, resize["pad_to"]).to(chosen)
        detections = detector.view(batch, training=False, frozen=True).detections
        for number, found in zip(batch.ids, detections, strict=True):
            kept = found.scores >= score
            labels = found.labels[kept].cpu()
            names = [detector.classes[label - 1] for label in labels.tolist()]
            masks = None if found.masks is None else found.masks[kept].cpu()
            results[number] = Prediction(found.boxes[kept].cpu(), found.scores[kept].cpu(), labels, names, masks)

    try:
        for number, given in enumerate(images):
            image = as_tensor(given, number)
            resized = transform.resize(image)
            empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
            sample = Sample(resized, empty, (image.shape[-2], image.shape[-1]), number)
            padded = tuple(-(-side // resize["pad_to"]) for side in resized.shape[-2:])
            waiting[padded].append(sample)
            if len(waiting[padded]) == batch_size:
                compute(waiting.pop(padded))
        for samples in waiting.values():
            compute(samples)
    finally:
        detector.to(previous_device).train(previous_mode)
    return [results[number] for number in range(len(results))]
