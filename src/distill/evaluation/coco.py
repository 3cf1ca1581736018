"""COCO's twelve metrics for boxes and for masks, computed by faster-coco-eval or pycocotools."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.data import rle
from distill.evaluation.metric import CodeArray, DetectionArrays, DetectionMetric, GroundTruth
from distill.types import DistillError

# The part of the result tables that each metric averages: table, IoU thresholds (0.5:0.05:0.95), area range (all,
# small, medium, large) and limit of detections (1, 10, 100).
_ALL = slice(None)
_NUMBER_SLICES: dict[str, tuple[str, slice, int, int]] = {
    "AP": ("precision", _ALL, 0, 2),
    "AP50": ("precision", slice(0, 1), 0, 2),
    "AP75": ("precision", slice(5, 6), 0, 2),
    "APs": ("precision", _ALL, 1, 2),
    "APm": ("precision", _ALL, 2, 2),
    "APl": ("precision", _ALL, 3, 2),
    "AR1": ("recall", _ALL, 0, 0),
    "AR10": ("recall", _ALL, 0, 1),
    "AR100": ("recall", _ALL, 0, 2),
    "ARs": ("recall", _ALL, 1, 2),
    "ARm": ("recall", _ALL, 2, 2),
    "ARl": ("recall", _ALL, 3, 2),
}
_BACKENDS = {
    "faster_coco_eval": ("faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.cocoeval", "COCOeval"),
}


class CocoMetric(DetectionMetric):
    """COCO's AP and AR of boxes and, optionally, of masks, on the original annotations with their areas and crowds.

    Keys: `AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl`, in [0, 1], and with `per_class` one
    `AP/<name>` per class. A metric without ground truth is -1, as in pycocotools. Detections with equal scores are
    ranked by image id, then in the detector's order. With `masks` there are the same keys for masks, `mask_AP`, ...,
    `mask_AP/<name>`: their overlap is that of pixels. They are -1 if a detection has no mask.

    A crowd (`iscrowd`) is ignored as in COCO: it matches any number of detections, by intersection over the detection's
    own area. A VOC object marked `difficult` is ignored too, but as a single object: one detection may match it by
    ordinary IoU, and is then neither a true nor a false positive. pycocotools alone would count it.

    Source: cocodataset.org/#detection-eval; Lin et al. 2014, arXiv 1405.0312.

    Args:
        ground_truth, classes, seen_only: see :class:`DetectionMetric`.
        backend: `faster_coco_eval`, `pycocotools` (the reference; equal results, slower), or `auto`: the first of the
            two that is installed.
        per_class: whether to add `AP/<name>` for every class.
        masks: whether to measure masks too.

    Raises:
        DistillError: `backend` is unknown or not installed, or the ground truth is invalid.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        classes: Sequence[str],
        backend: str = "auto",
        per_class: bool = False,
        seen_only: bool = False,
        masks: bool = False,
    ) -> None:
        super().__init__(ground_truth, classes, seen_only, masks)
        self.backend = _choose_backend(backend)
        self.per_class = per_class

    def evaluate(self, truth: GroundTruth, detections: DetectionArrays) -> dict[str, float]:
        """Compute all metrics from arrays. Keys and values are those of the class."""
        numbers = self._numbers(truth, detections, "bbox")
        if self.masks:
            numbers |= {f"mask_{name}": value for name, value in self._numbers(truth, detections, "segm").items()}
        return numbers

    def _numbers(self, truth: GroundTruth, detections: DetectionArrays, kind: str) -> dict[str, float]:
        if not truth.images.size or (kind == "segm" and any(code is None for code in detections.code)):
            tables = {"precision": np.full((10, 101, len(self.classes), 4, 3), -1.0)}
            tables["recall"] = tables["precision"][:, 0]
        else:
            tables = self._tables(truth, detections, kind)
        numbers = {
            key: _mean_measured(tables[table][ious, ..., area, limit])
            for key, (table, ious, area, limit) in _NUMBER_SLICES.items()
        }
        if self.per_class:
            numbers |= {
                f"AP/{name}": _mean_measured(tables["precision"][:, :, k, 0, 2]) for k, name in enumerate(self.classes)
            }
        return numbers

    def _tables(self, truth: GroundTruth, detections: DetectionArrays, kind: str) -> dict[str, Any]:
        """Run the backend and return its tables `precision` (10, 101, K, 4, 3) and `recall` (10, K, 4, 3).

        The axes are IoU thresholds, recalls (of `precision` only), classes, area ranges and limits of detections.
        """
        api, evaluator = _import_backend(self.backend)
        frame = {
            "images": [{"id": image, **self._frame(image)} for image in truth.images.tolist()],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.classes, start=1)],
        }
        rows = ground_truth_rows(truth), detection_rows(detections)
        if kind == "segm":
            self._add_masks(rows[0], truth.code)
            self._add_masks(rows[1], detections.code)
            for row, code in zip(rows[1], detections.code, strict=True):
                row["area"] = rle.mask_area(code, self.sizes[row["image_id"]])
        # Both backends may print their progress.
        with contextlib.redirect_stdout(io.StringIO()):
            datasets = []
            for annotations in rows:
                dataset = api()
                dataset.dataset = {**frame, "annotations": annotations}
                dataset.createIndex()
                datasets.append(dataset)
            evaluation = evaluator(*datasets, iouType=kind)
            evaluation.evaluate()
            evaluation.accumulate()
        tables: dict[str, Any] = evaluation.eval
        return tables

    def _frame(self, image: int) -> dict[str, int]:
        return dict(zip(("height", "width"), self.sizes.get(image, ()), strict=False))

    def _add_masks(self, rows: Sequence[dict[str, Any]], codes: CodeArray) -> None:
        for row, code in zip(rows, codes, strict=True):
            row["segmentation"] = rle.to_coco(code, self.sizes[row["image_id"]])


def ground_truth_rows(truth: GroundTruth) -> list[dict[str, Any]]:
    """Make a new annotation for every object: the backends write into them. Ids start at 1, as 0 means "unmatched"."""
    # An area outside every range makes the backends ignore an object with ordinary IoU. No flag does that: both
    # overwrite "ignore".
    area = np.where(truth.difficult & ~truth.crowd, np.inf, truth.area)
    columns = (truth.image, truth.label, truth.box, area, truth.crowd.astype(int))
    return [
        {"id": index, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
        for index, (image, label, box, area, crowd) in enumerate(zip(*map(np.ndarray.tolist, columns), strict=True), 1)
    ]


def detection_rows(detections: DetectionArrays) -> list[dict[str, Any]]:
    """Make a new annotation for every detection. Ids start at 1."""
    box = np.concatenate([detections.box[:, :2], detections.box[:, 2:] - detections.box[:, :2]], axis=1)
    columns = (detections.image, detections.label, box, box[:, 2] * box[:, 3], detections.score)
    return [
        {"id": index, "image_id": image, "category_id": label, "bbox": box, "area": area, "score": score, "iscrowd": 0}
        for index, (image, label, box, area, score) in enumerate(zip(*map(np.ndarray.tolist, columns), strict=True), 1)
    ]


def _mean_measured(values: Any) -> float:
    """Return the mean of the measured values, those above -1, or -1 without any."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _choose_backend(backend: str) -> str:
    if backend != "auto" and backend not in _BACKENDS:
        raise DistillError(f"Expected a COCO backend among auto, {', '.join(_BACKENDS)}, got '{backend}'.")
    for name in _BACKENDS if backend == "auto" else (backend,):
        with contextlib.suppress(ImportError):
            _import_backend(name)
            return name
    raise DistillError(
        f"The COCO backend '{backend}' cannot be imported. Install it (pip install faster-coco-eval pycocotools) "
        "or choose backend=auto."
    )


def _import_backend(backend: str) -> tuple[Any, Any]:
    module, evaluator = _BACKENDS[backend]
    coco = importlib.import_module("pycocotools.coco" if backend == "pycocotools" else module)
    return coco.COCO, getattr(importlib.import_module(module), evaluator)
