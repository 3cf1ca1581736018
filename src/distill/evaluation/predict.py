"""Detections of a run's student in images, from Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from distill.detectors.base import Detector
from distill.detectors.prediction import Prediction
from distill.detectors.registry import load_detector


def predict(
    source: Detector | str | Path,
    images: Iterable[Any],
    score: float = 0.05,
    device: torch.device | str | None = None,
    batch_size: int = 1,
) -> list[Prediction]:
    """Detect objects in images. For many calls, load the detector once and call it: ``detector(images)``.

    Args:
        source: a detector, or the path of a run folder, of its ``student.pt`` or of a checkpoint.
        images: tensors (3, H, W), arrays (H, W, 3), PIL images or paths of files, see `imaging.conversion`.
        score: lowest score of a detection. The detector itself has a limit, too (``model.score_thresh``).
        device: device of the computation. None: the device of a given detector; for a path CUDA if available, else the
            CPU.
        batch_size: images that are computed together, see `Detector.forward`.

    Returns:
        One prediction per image, in the order of the images, on the CPU.

    Raises:
        DistillError: the source or an image cannot be read.

    Example:
        `distill.predict("outputs/NAME/RUN", ["a.jpg"])[0].boxes`
    """
    if isinstance(source, Detector):
        previous = source.device
        try:
            return source.to(device or previous)(images, score, batch_size)  # type: ignore[no-any-return]
        finally:
            source.to(previous)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_detector(source).to(chosen)(images, score, batch_size)  # type: ignore[no-any-return]
