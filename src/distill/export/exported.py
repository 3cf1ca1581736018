"""Exported files as detectors: what `predict` and `evaluate` call instead of a detector of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from distill.detectors.prediction import Prediction, to_prediction
from distill.export.onnx_file import OnnxProgram
from distill.export.openvino_file import OpenVinoProgram
from distill.export.suffixes import is_exported
from distill.export.torchscript_file import TorchScriptProgram
from distill.imaging.conversion import as_tensor
from distill.imaging.resizing import copy_padded, resize_boxes, resize_image, resized_size
from distill.types import Detections, DistillError, Size

PROGRAMS: dict[str, Callable[..., Any]] = {
    ".onnx": OnnxProgram,
    ".xml": OpenVinoProgram,
    ".torchscript": TorchScriptProgram,
}
"""Extension of an exported file -> the program that runs it."""


class ExportedDetector:
    """A file that `distill export` wrote, on the CPU.

    Args:
        path: the file.
        threads: number of threads; 0: as many as the machine has cores.

    Raises:
        DistillError: the file does not exist, cannot be read, was not written by `distill export`, or its runtime is
            not installed.

    Example:
        `distill.ExportedDetector("student.onnx")(["image.jpg"])[0].names`
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DistillError(f"{path}: there is no such file. Expected a file that 'distill export' wrote")
        if not is_exported(self.path.name):
            raise DistillError(f"{path}: expected a file with the extension {' or '.join(PROGRAMS)}")
        self.run = PROGRAMS[self.path.suffix.lower()](self.path, threads)
        self.facts: dict[str, Any] = self.run.facts
        self.classes = tuple(str(name) for name in self.facts["classes"])

    def __call__(self, images: Iterable[Any], score: float = 0.0) -> list[Prediction]:
        """Detect objects in images, as `Detector` does.

        Args:
            images: tensors (3, H, W), arrays (H, W, 3), PIL images or paths of files, see `imaging.conversion`.
            score: lowest score of a detection. The file has a limit, too (``score_threshold`` in its metadata).

        Raises:
            DistillError: an image cannot be read, or the file does not hold a whole detector.
        """
        tensors = (as_tensor(image, number) for number, image in enumerate(images))
        return [to_prediction(self.detect(image), self.classes, score) for image in tensors]

    def detect(self, image: Tensor) -> Detections:
        """Detections in an image (3, H, W) uint8, in its pixels, best first.

        Raises:
            DistillError: the file does not hold a whole detector.
        """
        if self.facts["parts"] == "full":
            found = self.run(image.permute(1, 2, 0).contiguous())
            return Detections(found["boxes"], found["scores"], found["labels"], found.get("masks"))
        return self.finish(*self.candidates(image), (image.shape[-2], image.shape[-1]))

    def candidates(self, image: Tensor) -> tuple[dict[str, Tensor], Size]:
        """Outputs of a dense file for an image (3, H, W), and the size of the resized image."""
        rule, canvas = self.facts["resize"], self.facts["canvas"]
        original = (image.shape[-2], image.shape[-1])
        size = resized_size(original, rule["min_size"], rule["max_size"], rule.get("shape", "ratio"))
        if size[0] > canvas[0] or size[1] > canvas[1]:
            raise DistillError(
                f"{self.path.name}: an image of {original[1]}x{original[0]} pixels is resized to {size[1]}x{size[0]}, "
                f"which does not fit on the canvas of {canvas[1]}x{canvas[0]}; export again with a larger --canvas"
            )
        images = torch.empty(1, 3, *canvas, dtype=torch.uint8)
        copy_padded([resize_image(image, size, rule["antialias"])], images)
        return self.run(images, torch.tensor([size], dtype=torch.int32)), size

    def finish(self, outputs: dict[str, Tensor], size: Size, original: Size) -> Detections:
        """Detections from the best candidates of a dense file: threshold, NMS by class, original pixels."""
        if "boxes" not in outputs or not self.facts["detects"]:
            kind = "proposals of a two-stage detector" if "boxes" in outputs else "raw outputs"
            raise DistillError(
                f"{self.path.name} has {kind}, not detections. Expected a file of --parts full"
                + ("" if not self.facts["detects"] else ", or of --parts dense --top K")
            )
        boxes, scores, labels = (outputs[name][0] for name in ("boxes", "scores", "labels"))
        return select_detections(boxes, scores, labels, self.facts, size, original)


def select_detections(
    boxes: Tensor, scores: Tensor, labels: Tensor, facts: dict[str, Any], size: Size, original: Size
) -> Detections:
    """Threshold and, if the file's facts have one, NMS by class; boxes (N, 4) are scaled from `size` to `original`."""
    sure = scores > facts["score_threshold"]
    boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
    threshold, count = facts["nms_threshold"], facts["detections_per_image"]
    if threshold is None:  # a set-prediction detector has no NMS
        return Detections(resize_boxes(boxes[:count], size, original), scores[:count], labels[:count])
    keep = batched_nms(boxes, scores, labels, threshold)[:count]
    return Detections(resize_boxes(boxes[keep], size, original), scores[keep], labels[keep])
