"""Evaluation of any detector on any split. Validation, teachers and the command line share this code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.coco import CocoMetric
from distill.evaluation.metric import DetectionMetric
from distill.labels import shared_labels
from distill.progress import track
from distill.types import Batch, Detections, DistillError

MetricFactory = Callable[[Mapping[str, Any], Sequence[str]], DetectionMetric]
"""A function of the ground truth in COCO form and the class names that returns a metric."""


class NamesClasses(Protocol):
    """A program whose detections can be evaluated."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; label 0 is background."""


class Evaluation:
    """Collects the detections of a detector batch by batch and computes all metrics.

    Classes of detector and data are matched by name. Detections of classes that the data does not have are dropped. A
    class of the data that the detector does not know has no detections, so its AP is 0. In this case every metric is
    also measured on the shared classes only, as `shared_<name>`, for example `shared_AP`.

    Args:
        detector: the detector to evaluate; for `add_detections` its class names are enough.
        ground_truth: ground truth in COCO form; its labels are those of `classes`.
        classes: class names of the data; class `i` has label `i + 1`.
        metrics: factories of the metrics.
        device: device of the metrics and of the detections.
        seen_only: whether only the images that are added count. By default an image that is not added counts as an
            image without detections.

    Raises:
        DistillError: detector and data share no class name.
    """

    def __init__(
        self,
        detector: Detector | NamesClasses,
        ground_truth: Mapping[str, Any],
        classes: Sequence[str],
        metrics: Sequence[MetricFactory],
        device: torch.device,
        seen_only: bool = False,
    ) -> None:
        self.detector = detector
        names = detector.spec.data_classes if isinstance(detector, Detector) else detector.classes
        labels = shared_labels(names, classes)
        self.labels = torch.tensor(labels, device=device)
        self.metrics = [make(ground_truth, classes).to(device) for make in metrics]
        for metric in self.metrics:
            metric.known_labels = set(labels) - {0}
            metric.seen_only |= seen_only

    def update(self, batch: Batch) -> None:
        """Run the detector on a batch and add its detections to all metrics."""
        detector = cast(Detector, self.detector)
        self.add_detections(batch.ids, detector.view(batch, training=False, frozen=True).detections)

    def add_detections(self, ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detector's detections in the images with these ids, with the detector's labels, to all metrics."""
        shared = [relabel_detections(in_image, self.labels) for in_image in detections]
        for metric in self.metrics:
            metric.update(ids, shared)

    def compute(self) -> dict[str, float]:
        """Compute all metrics, by name. The values are equal on all ranks.

        Raises:
            DistillError: two metrics return the same name.
        """
        values: dict[str, float] = {}
        for metric in self.metrics:
            results = metric.compute()
            repeated = sorted(values.keys() & results.keys())
            if repeated:
                raise DistillError(f"two of the metrics give a number the name {repeated[0]}; leave one of them out")
            values |= results
        return values


def evaluate(
    detector: Detector,
    data: DetectionData,
    split: str = "val",
    metrics: Sequence[MetricFactory] = (CocoMetric,),
    device: torch.device | str = "cpu",
    bar: str | None = None,
) -> dict[str, float]:
    """Evaluate a detector on a split, in evaluation mode.

    Afterwards the detector has its previous mode and device again.

    Args:
        detector: the detector to evaluate.
        data: the data set.
        split: `train`, `val` or `test`.
        metrics: factories of the metrics.
        device: device of the evaluation.
        bar: caption of a progress bar, which is shown on terminals only; None for no bar.

    Returns:
        The metrics by name, and those of the shared classes if the detector does not know every class of the data, see
        `Evaluation`. The values are equal on all ranks.

    Raises:
        DistillError: detector and data share no class name, or two metrics return the same name.

    Example:
        `evaluate(detector, data)["AP"]`
    """
    device = torch.device(device)
    evaluation = Evaluation(detector, data.ground_truth(split), data.classes, metrics, device)
    previous_device = next(detector.parameters()).device
    detector.to(device)
    previous_mode = detector.training
    detector.train(False)
    try:
        for batch in track(data.eval_dataloader(split), bar):
            evaluation.update(batch.to(device))
    finally:
        detector.train(previous_mode)
        detector.to(previous_device)
    return evaluation.compute()


def ground_truth_of(truth: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Return the part of a ground truth in COCO form that belongs to the images with these ids."""
    selected = set(ids)
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in selected],
        "annotations": [row for row in truth["annotations"] if row["image_id"] in selected],
    }


def relabel_detections(detections: Detections, labels: torch.Tensor) -> Detections:
    """Replace the detector's labels by the data's labels. Drop detections of classes that the data does not have.

    `labels` maps each label of the detector to the label of the data, or to 0 if the data has no such class.
    """
    mapped = labels[detections.labels]
    keep = mapped > 0
    masks = None if detections.masks is None else detections.masks[keep]
    return Detections(detections.boxes[keep], detections.scores[keep], mapped[keep], masks)
