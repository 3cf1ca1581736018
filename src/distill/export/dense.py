"""A dense file together with the student, which computes the rest of the detections, to measure the file's AP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from distill.detectors.base import Detector
from distill.export.exported import ExportedDetector, select_detections
from distill.imaging.resizing import copy_padded, resize_image
from distill.types import Batch, Detections, QueryLayer, Size, Target


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
        if "boxes" in outputs and self.exported.facts["detects"]:
            return self.exported.finish(outputs, size, original)
        view = self._view(image, size)
        if "query_boxes" in outputs:
            frame = torch.tensor([size[1], size[0]] * 2)
            boxes = box_convert(outputs["query_boxes"] / frame, "xyxy", "cxcywh")
            vars(view)["queries"] = [QueryLayer(outputs["logits"], boxes, boxes[..., :0])]
        elif "boxes" in outputs:
            vars(view)["proposals"] = [self._proposals(outputs, size)]
        elif self.exported.facts["detects"]:
            self._replace_dense_outputs(view, outputs)
        else:
            vars(view)["_flat"] = outputs["logits"].reshape(-1, 1), outputs["deltas"].reshape(-1, 4)
        found: Detections = view.detections[0]
        return found

    def _view(self, image: Tensor, size: Size) -> Any:
        """The student's View of an image on the file's canvas."""
        canvas = torch.zeros(1, 3, *self.exported.facts["canvas"], dtype=torch.uint8)
        copy_padded([resize_image(image, size, self.detector.resize.antialias)], canvas)
        target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        batch = Batch(canvas, (size,), ((image.shape[-2], image.shape[-1]),), (target,), (0,))
        return self.detector.view(batch, training=False, frozen=True)

    def _proposals(self, outputs: dict[str, Tensor], size: Size) -> Tensor:
        """Proposals (P, 4) from the best candidates: NMS over all levels together, unlike that of the student."""
        options = self.detector.options
        rule = {
            "score_threshold": 0.0,
            "nms_threshold": options["rpn_nms_thresh"],
            "detections_per_image": options["rpn_post_nms_top_n_test"],
        }
        boxes, scores = outputs["boxes"][0], outputs["scores"][0]
        return select_detections(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), rule, size, size).boxes

    @staticmethod
    def _replace_dense_outputs(view: Any, outputs: dict[str, Tensor]) -> None:
        """Give the View of a one-stage detector the file's outputs instead of those of its head."""
        counts = [len(level) for level in view.anchors.values()]
        # The file has no output for label 0, which a View drops.
        named = {
            "cls_logits": F.pad(outputs["logits"], (1, 0), value=-torch.inf),
            "bbox_regression": outputs["deltas"],
            **({"bbox_ctrness": outputs["centerness"]} if "centerness" in outputs else {}),
        }
        levels = {name: list(torch.split(values, counts, dim=1)) for name, values in named.items()}
        view._flat = lambda: levels
