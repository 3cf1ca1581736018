"""AP of any detector on any split: the one road that validation, teachers and the command line all take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.coco import CocoMetric
from distill.evaluation.metric import DetectionMetric
from distill.labels import shared_labels
from distill.progress import track
from distill.types import Batch, Detections, DistillError

MetricFactory = Callable[[Mapping[str, Any], Sequence[str]], DetectionMetric]
"""(ground truth in COCO form, class names) -> metric."""


class Evaluation:
    """Collects a detector's detections batch by batch, then gives the numbers of all metrics.

    A detector whose class list differs from the data's is measured on the classes that both name; what it finds of other
    classes is dropped.

    Raises:
        DistillError: detector and data share no class name.
    """

    def __init__(
        self,
        detector: Detector,
        ground_truth: Mapping[str, Any],
        classes: Sequence[str],
        metrics: Sequence[MetricFactory],
        device: torch.device,
    ) -> None:
        self.detector = detector
        self.labels = torch.tensor(shared_labels(detector.spec.classes, classes), device=device)
        self.metrics = [make(ground_truth, classes).to(device) for make in metrics]

    def update(self, batch: Batch) -> None:
        """Detect in a batch and remember what was found."""
        self.add_detections(batch, self.detector.view(batch, training=False, frozen=True).detections)

    def add_detections(self, batch: Batch, found: Sequence[Detections]) -> None:
        """Remember what the detector found in a batch."""
        shared = [relabel_detections(detections, self.labels) for detections in found]
        for metric in self.metrics:
            metric.update(batch.ids, shared)

    def compute(self) -> dict[str, float]:
        """Every metric's numbers; equal on all ranks.

        Raises:
            DistillError: two of them have one name.
        """
        values: dict[str, float] = {}
        for metric in self.metrics:
            found = metric.compute()
            twice = sorted(values.keys() & found.keys())
            if twice:
                raise DistillError(f"two of the metrics give a number the name {twice[0]}; leave one of them out")
            values |= found
        return values


def evaluate(
    detector: Detector,
    data: DetectionData,
    split: str = "val",
    metrics: Sequence[MetricFactory] = (CocoMetric,),
    device: torch.device | str = "cpu",
    bar: str | None = None,
) -> dict[str, float]:
    """AP and the rest of a detector on a split, in evaluation mode; equal on all ranks. It comes back to where it was.

    On a terminal a progress bar runs along where ``bar`` is its caption.

    Example:
        ``evaluate(detector, data)["AP"]``
    """
    place = torch.device(device)
    evaluation = Evaluation(detector, data.ground_truth(split), data.classes, metrics, place)
    home = next(detector.parameters()).device
    detector.to(place)
    before = detector.training
    detector.train(False)
    try:
        for batch in track(data.eval_dataloader(split), bar):
            evaluation.update(batch.to(place))
    finally:
        detector.train(before)
        detector.to(home)
    return evaluation.compute()


def ground_truth_of(truth: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """The part of a ground truth in COCO form that belongs to these images."""
    wanted = set(ids)
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in wanted],
        "annotations": [note for note in truth["annotations"] if note["image_id"] in wanted],
    }


def relabel_detections(found: Detections, labels: torch.Tensor) -> Detections:
    """Detections in the data's labels, without those of classes that the data does not know."""
    mapped = labels[found.labels]
    keep = mapped > 0
    masks = None if found.masks is None else found.masks[keep]
    return Detections(found.boxes[keep], found.scores[keep], mapped[keep], masks)
