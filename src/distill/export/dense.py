"""A dense file completed by its detector, so that its AP can be measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.detectors.base import Detector
from distill.export.exported import ExportedDetector, select_detections
from distill.export.graphs import decode
from distill.imaging.resizing import copy_padded, resize_image
from distill.types import Batch, Detections, Target

CANDIDATES = 1000
"""Candidates of an image that are decoded from raw outputs."""


class DenseProgram:
    """Detections of a dense file. The detector computes what the file leaves out.

    Args:
        exported: a dense file.
        detector: the student, on the CPU and in evaluation mode.
    """

    def __init__(self, exported: ExportedDetector, detector: Detector) -> None:
        self.exported, self.detector = exported, detector

    @torch.no_grad()
    def detect(self, image: Tensor) -> Detections:
        """Detections in an image (3, H, W) uint8, in its pixels."""
        original = (image.shape[-2], image.shape[-1])
        outputs, size = self.exported.candidates(image)
        if "boxes" not in outputs:
            sizes = torch.tensor([size], dtype=torch.int32)
            outputs = dict(
                zip(("boxes", "scores", "labels"), decode(self.detector, outputs, sizes, CANDIDATES), strict=True)
            )
        if self.exported.facts["detects"]:
            return self.exported.finish(outputs, size, original)
        options = self.detector.options
        rule = {
            "score_threshold": 0.0,
            "nms_threshold": options["rpn_nms_thresh"],
            "detections_per_image": options["rpn_post_nms_top_n_test"],
        }
        boxes, scores = outputs["boxes"][0], outputs["scores"][0]
        proposals = select_detections(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), rule, size, size)
        return self._second_stage(image, size, proposals.boxes)

    def _second_stage(self, image: Tensor, size: tuple[int, int], proposals: Tensor) -> Detections:
        """Detections of the student's box head and mask head for these proposals."""
        canvas = torch.zeros(1, 3, *self.exported.facts["canvas"], dtype=torch.uint8)
        copy_padded([resize_image(image, size, self.detector.resize.antialias)], canvas)
        target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        original = (image.shape[-2], image.shape[-1])
        view: Any = self.detector.view(
            Batch(canvas, (size,), (original,), (target,), (0,)), training=False, frozen=True
        )
        vars(view)["proposals"] = [proposals]
        found: Detections = view.detections[0]
        return found
