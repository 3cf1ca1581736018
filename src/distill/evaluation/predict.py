"""Detections of a detector in images of any kind: tensors, arrays, PIL images and files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.data.pixels import as_tensor
from distill.data.transforms import Sample, Transform, collate
from distill.detectors.base import Detector
from distill.detectors.registry import load_detector
from distill.detectors.student_files import read_extra
from distill.run_folder import DESCRIPTION
from distill.types import Detections, DistillError, Target


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


class Predictor:
    """A detector and the resize that it was trained with.

    Args:
        source: a detector, or the path of a run folder, of its ``student.pt`` or of a checkpoint.
        device: device of the computation; None: CUDA if available, else the CPU. The detector is moved there, in
            evaluation mode.

    Raises:
        DistillError: the source cannot be read.
    """

    def __init__(self, source: Detector | str | Path, device: torch.device | str | None = None) -> None:
        self.extra = {} if isinstance(source, Detector) else read_extra(Path(source))
        resize = _read_resize(self.extra, str(source))
        self.detector = source if isinstance(source, Detector) else load_detector(source)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.detector.eval().to(self.device)
        self.pad_to: int = resize["pad_to"]
        options = self.detector.options
        self._transform = Transform((options["min_size"],), options["max_size"], antialias=resize["antialias"])

    def prepare(self, image: Tensor, number: int) -> Sample:
        """Resize an image (3, H, W), uint8, and give it a number."""
        empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return Sample(self._transform.resize(image), empty, (image.shape[-2], image.shape[-1]), number)

    def detect(self, samples: list[Sample]) -> list[Detections]:
        """Return the detections of each image, on the CPU, in pixels of the original image."""
        batch = collate(samples, self.pad_to).to(self.device)
        found = self.detector.view(batch, training=False, frozen=True).detections
        return [
            Detections(
                image.boxes.cpu(),
                image.scores.cpu(),
                image.labels.cpu(),
                None if image.masks is None else image.masks.cpu(),
            )
            for image in found
        ]


def _read_resize(extra: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the options of the resize from the description of an exported student."""
    try:
        resize: dict[str, Any] = {"antialias": False, "pad_to": 32} | extra.get("resize", {})
        if not (isinstance(resize["antialias"], bool) and isinstance(resize["pad_to"], int) and resize["pad_to"] > 0):
            raise ValueError("antialias is true or false, pad_to a number of pixels")
    except (AttributeError, TypeError, ValueError) as error:
        raise DistillError(f"{source}: expected 'resize' in its {DESCRIPTION}: {error}") from error
    return resize


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
    previous = (next(source.parameters()).device, source.training) if isinstance(source, Detector) else None
    predictor = Predictor(source, device)
    results: dict[int, Prediction] = {}
    waiting: dict[tuple[int, ...], list[Sample]] = defaultdict(list)

    def compute(samples: list[Sample]) -> None:
        for sample, found in zip(samples, predictor.detect(samples), strict=True):
            kept = found.scores >= score
            names = [predictor.detector.classes[label - 1] for label in found.labels[kept].tolist()]
            masks = None if found.masks is None else found.masks[kept]
            results[sample.id] = Prediction(found.boxes[kept], found.scores[kept], found.labels[kept], names, masks)

    try:
        for number, given in enumerate(images):
            sample = predictor.prepare(as_tensor(given, number), number)
            padded = tuple(-(-side // predictor.pad_to) for side in sample.image.shape[-2:])
            waiting[padded].append(sample)
            if len(waiting[padded]) == batch_size:
                compute(waiting.pop(padded))
        for samples in waiting.values():
            compute(samples)
    finally:
        if previous is not None:
            predictor.detector.to(previous[0]).train(previous[1])
    return [results[number] for number in range(len(results))]
