"""The common base of detection metrics: collection of detections over all ranks, and ground truth as arrays.

A metric gets detections batch by batch and computes its values once::

    metric = CocoMetric(ground_truth, classes)
    metric.update(batch.ids, view.detections)
    numbers = metric.compute()

The detections are list states of torchmetrics. torchmetrics gathers them, so every rank computes the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from distill.data import rle
from distill.types import Detections, DistillError, Size

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
CodeArray = npt.NDArray[np.object_]
"""Run-length codes (bytes) of masks; None for an object or detection without a mask."""


SHARED = "shared_"
"""Prefix of a value that is measured on the classes that the detector knows."""


class GroundTruth(NamedTuple):
    """Ground truth in original pixels. Each of the N rows is an object, in the given order."""

    images: IntArray
    """Ids of the images to evaluate, unique and sorted."""
    image: IntArray
    label: IntArray
    box: FloatArray
    """(N, 4) xywh, as annotated."""
    area: FloatArray
    crowd: BoolArray
    difficult: BoolArray
    code: CodeArray

    def of_images(self, images: IntArray) -> GroundTruth:
        """Return the ground truth of the images with these ids."""
        rows = np.isin(self.image, images)
        return GroundTruth._make((images, *(column[rows] for column in self[1:])))

    def of_labels(self, labels: Collection[int]) -> GroundTruth:
        """Return the same images with the objects of these labels only."""
        rows = np.isin(self.label, list(labels))
        return GroundTruth._make((self.images, *(column[rows] for column in self[1:])))


class DetectionArrays(NamedTuple):
    """Detections in original pixels. Each of the N rows is a box.

    Rows are sorted by ascending image id, and within an image by the detector's order.
    """

    image: IntArray
    label: IntArray
    box: FloatArray
    """(N, 4) xyxy."""
    score: FloatArray
    code: CodeArray


class DetectionMetric(Metric):
    """Collects detections and passes them with the ground truth to `evaluate`, which a subclass implements.

    If an image is added twice, for example because a sampler pads its last batch, only the first one counts, in the
    order of the ranks.

    Args:
        ground_truth: a dict in COCO form: `images` (`id`), `annotations` (`image_id`, `category_id`, `bbox` xywh in
            original pixels; optional `area`, default w*h, `iscrowd` and `difficult`, default 0), and `categories` (`id`
            equal to the label, `name`). It is read once and never changed.
        classes: the K class names; class `i` has label `i + 1`.
        seen_only: whether to evaluate only the images that `update` has added. By default every image of the ground
            truth counts, as in the benchmarks: an image that was never added counts as an image without detections.
        masks: whether to collect masks too, as run-length codes. Every annotation then needs its `segmentation`, and
            every image `height` and `width`.

    Raises:
        DistillError: the ground truth is not in this form, or does not fit the classes.
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    full_state_update: bool | None = False

    ids: list[Tensor]
    counts: list[Tensor]
    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]
    codes: list[Tensor]
    """The bytes of all codes, concatenated."""
    lengths: list[Tensor]
    """Number of bytes of each detection's code; -1 for a detection without a mask."""

    def __init__(
        self, ground_truth: Mapping[str, Any], classes: Sequence[str], seen_only: bool = False, masks: bool = False
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.seen_only = seen_only
        self.known_labels: Collection[int] | None = None
        """Labels that the detector knows; None for all labels.

        If the detector does not know a class, `compute` adds the values of the known classes as `shared_<name>`.
        """
        self.masks = masks
        self.truth = parse_ground_truth(ground_truth, self.classes)
        self.sizes: dict[int, Size] = {}
        if masks:
            self.sizes = _image_sizes(ground_truth)
            self.truth = self.truth._replace(code=_encode_annotations(ground_truth, self.sizes))
        for state in ("ids", "counts", "boxes", "scores", "labels", *(("codes", "lengths") if masks else ())):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detections of some images.

        Args:
            ids: image ids of the ground truth.
            detections: one entry per image, with boxes xyxy in original pixels and labels from 1 to K, on any device.
                If masks are collected, they need the size of the original image and are encoded at once. Otherwise
                masks are ignored.

        Raises:
            DistillError: `ids` and `detections` differ in length, or shapes do not fit together.
        """
        if len(ids) != len(detections):
            raise DistillError(f"Expected detections for each of {len(ids)} image ids, got {len(detections)} entries.")
        for image, part in zip(ids, detections, strict=True):
            _validate_shapes(image, part)
        # float64 represents every value of a detector exactly. MPS does not support float64.
        real = torch.float32 if self.device.type == "mps" else torch.float64
        counts = [len(part.scores) for part in detections]
        self.ids.append(torch.tensor(ids, dtype=torch.int64, device=self.device))
        self.counts.append(torch.tensor(counts, dtype=torch.int64, device=self.device))
        self.boxes.append(self._concatenate([part.boxes for part in detections], real, (0, 4)))
        self.scores.append(self._concatenate([part.scores for part in detections], real, (0,)))
        self.labels.append(self._concatenate([part.labels for part in detections], torch.int64, (0,)))
        if self.masks:
            codes = [
                code for image, part in zip(ids, detections, strict=True) for code in self._encode_masks(image, part)
            ]
            lengths = [-1 if code is None else len(code) for code in codes]
            content = np.frombuffer(b"".join(code or b"" for code in codes), np.uint8).copy()
            self.codes.append(torch.from_numpy(content).to(self.device))
            self.lengths.append(torch.tensor(lengths, dtype=torch.int64, device=self.device))

    def _encode_masks(self, image: int, detections: Detections) -> Sequence[bytes | None]:
        masks = detections.masks
        if masks is None:
            return [None] * len(detections.scores)
        expected = (len(detections.scores), *self.sizes.get(image, masks.shape[1:]))
        if tuple(masks.shape) != expected:
            raise DistillError(
                f"Expected masks (N, H, W) {expected} for image {image}, in its original pixels, got "
                f"{tuple(masks.shape)}."
            )
        return rle.encode_masks(masks)

    def _concatenate(self, parts: Sequence[Tensor], dtype: torch.dtype, empty: tuple[int, ...]) -> Tensor:
        moved = [part.detach().to(self.device, dtype) for part in parts]
        return torch.cat([torch.empty(empty, dtype=dtype, device=self.device), *moved])

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Gather the states of all ranks. A rank without images contributes empty tensors of the right type and shape.

        torchmetrics would contribute a one-dimensional float tensor instead, and the gather of the other ranks would
        hang.
        """
        if isinstance(self.ids, list) and not self.ids:
            self.update((), ())
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def compute(self) -> dict[str, float]:
        """Compute the values by name. A value is -1 if there is nothing to measure.

        Raises:
            DistillError: detections have unknown image ids or labels, or boxes and scores that are NaN, infinite or
                inverted.
        """
        detections, seen = self._collect()
        truth = self.truth.of_images(seen) if self.seen_only else self.truth
        values = self.evaluate(truth, detections)
        if self.known_labels is not None and len(self.known_labels) < len(self.classes):
            shared = self.evaluate(truth.of_labels(self.known_labels), detections)
            values |= {f"{SHARED}{name}": value for name, value in shared.items() if "/" not in name}
        return values

    def evaluate(self, truth: GroundTruth, detections: DetectionArrays) -> dict[str, float]:
        """Compute the metric from arrays. `compute` calls this once, with the detections of all ranks."""
        raise NotImplementedError

    def _collect(self) -> tuple[DetectionArrays, IntArray]:
        """Return all detections as arrays, each image once, and the sorted ids of the added images."""
        states = (self.ids, self.counts, self.boxes, self.scores, self.labels)
        ids, counts, boxes, scores, labels = (dim_zero_cat(state).cpu().numpy() for state in states)
        seen, first = np.unique(ids, return_index=True)
        rows = concatenate_ranges((np.cumsum(counts) - counts)[first], counts[first])
        detections = DetectionArrays(
            image=np.repeat(seen, counts[first]),
            label=labels[rows],
            box=boxes[rows].astype(np.float64),
            score=scores[rows].astype(np.float64),
            code=self._gather_codes()[rows] if self.masks else np.full(len(rows), None, dtype=object),
        )
        self._validate_detections(detections, seen)
        return detections, seen

    def _gather_codes(self) -> CodeArray:
        """Return the codes of all detections, in the order in which they were added."""
        content = dim_zero_cat(self.codes).cpu().numpy().tobytes()
        lengths = dim_zero_cat(self.lengths).tolist()
        codes, end = np.full(len(lengths), None, dtype=object), 0
        for index, length in enumerate(lengths):
            if length >= 0:
                codes[index], end = content[end : end + length], end + length
        return codes

    def _validate_detections(self, detections: DetectionArrays, seen: IntArray) -> None:
        unknown = np.setdiff1d(seen, self.truth.images)
        if unknown.size:
            raise DistillError(
                f"Expected detections of the {len(self.truth.images)} images of the ground truth, got {unknown.size} "
                f"other image ids: {_first_values(unknown)}. Evaluate on the data set and split that the metric was "
                "built for."
            )
        image, label, box, score, _ = detections
        outside = (label < 1) | (label > len(self.classes))
        if outside.any():
            raise DistillError(
                f"Expected detection labels from 1 to {len(self.classes)}, got {_first_values(label[outside])} in "
                f"images {_first_values(image[outside])}. Map the detector's class list to the data's by name first."
            )
        invalid = ~(np.isfinite(box).all(1) & np.isfinite(score)) | (box[:, 2:] < box[:, :2]).any(1)
        if invalid.any():
            raise DistillError(
                f"Expected finite xyxy boxes and scores, got {int(invalid.sum())} NaN, infinite or inverted ones in "
                f"images {_first_values(image[invalid])}. Look for NaN in the weights, or evaluate in float32."
            )


def parse_ground_truth(ground_truth: Mapping[str, Any], classes: Sequence[str]) -> GroundTruth:
    """Convert a ground truth in COCO form to arrays.

    Raises:
        DistillError: a key is missing, image ids repeat, or the ids and names do not fit together.
    """
    for key in ("images", "annotations", "categories"):
        if key not in ground_truth:
            raise DistillError(f"Expected ground truth in COCO form with '{key}', got the keys {sorted(ground_truth)}.")
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    expected = dict(enumerate(classes, start=1))
    if names != expected or len(set(classes)) != len(classes):
        raise DistillError(
            f"Expected categories with the ids and the different names {expected}, got {names}. "
            "Number the categories as the classes are ordered, from 1."
        )
    annotations = ground_truth["annotations"]
    ids = [image["id"] for image in ground_truth["images"]]
    truth = GroundTruth(
        images=np.unique(np.array(ids, dtype=np.int64)),
        image=np.array([annotation["image_id"] for annotation in annotations], dtype=np.int64),
        label=np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64),
        box=np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4),
        area=np.array([_annotation_area(annotation) for annotation in annotations], dtype=np.float64),
        crowd=np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], dtype=np.bool_),
        difficult=np.array([bool(annotation.get("difficult", 0)) for annotation in annotations], dtype=np.bool_),
        code=np.full(len(annotations), None, dtype=object),
    )
    _validate_ground_truth(truth, ids, len(classes))
    return truth


def concatenate_ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """Concatenate the ranges `start, start + 1, ..., start + count - 1` of all pairs of start and count."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _image_sizes(ground_truth: Mapping[str, Any]) -> dict[int, Size]:
    """Return a mapping of image id to (height, width)."""
    try:
        return {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    except KeyError as error:
        raise DistillError(
            f"Expected images with 'height' and 'width' to measure masks, got some without {error}."
        ) from None


def _encode_annotations(ground_truth: Mapping[str, Any], sizes: Mapping[int, Size]) -> CodeArray:
    """Return the run-length code of each annotation's mask."""
    codes = np.full(len(ground_truth["annotations"]), None, dtype=object)
    for index, annotation in enumerate(ground_truth["annotations"]):
        try:
            codes[index] = rle.encode_segmentation(annotation.get("segmentation"), sizes[annotation["image_id"]])
        except ValueError as error:
            raise DistillError(
                f"Expected a segmentation for every annotation to measure masks, but that of annotation {index} "
                f"(image {annotation['image_id']}) {error}. Load the data with data.masks=true, or set "
                "metrics.coco.masks=false."
            ) from error
    return codes


def _annotation_area(annotation: Mapping[str, Any]) -> float:
    area = annotation.get("area")
    return float(annotation["bbox"][2] * annotation["bbox"][3] if area is None else area)


def _validate_ground_truth(truth: GroundTruth, ids: Sequence[int], classes: int) -> None:
    if len(truth.images) != len(ids):
        raise DistillError(
            f"Expected different image ids in the ground truth, got {len(ids) - len(truth.images)} twice."
        )
    orphans = np.setdiff1d(truth.image, truth.images)
    if orphans.size:
        raise DistillError(
            f"Expected annotations of the listed images, got some of other images: {_first_values(orphans)}."
        )
    outside = truth.label[(truth.label < 1) | (truth.label > classes)]
    if outside.size:
        raise DistillError(f"Expected annotations with category ids from 1 to {classes}, got {_first_values(outside)}.")


def _validate_shapes(image: int, detections: Detections) -> None:
    boxes, scores, labels = (tuple(tensor.shape) for tensor in detections[:3])
    if boxes != (*scores, 4) or scores != labels or len(scores) != 1:
        raise DistillError(
            f"Expected boxes (N, 4), scores (N,) and labels (N,) for image {image}, got {boxes}, {scores} and {labels}."
        )


def _first_values(values: IntArray, most: int = 5) -> str:
    """Return the first few distinct values as text, for a message."""
    distinct = np.unique(values)
    return ", ".join(map(str, distinct[:most].tolist())) + (", ..." if len(distinct) > most else "")
