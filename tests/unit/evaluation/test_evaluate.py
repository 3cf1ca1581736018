"""A detector whose class list differs from that of the data: AP of all classes of the data, and of the shared ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.evaluation.coco import CocoMetric
from distill.evaluation.evaluate import Evaluation
from distill.evaluation.voc import VocMetric
from distill.types import Detections, DistillError

DATA = ("cat", "dog", "lorry")


def evaluation(model: tuple[str, ...], metric: Any, seen_only: bool = False) -> Evaluation:
    """Two images, each with a cat, a dog and a lorry in three corners."""
    truth = {
        "images": [{"id": image, "width": 90, "height": 90} for image in (1, 2)],
        "annotations": [
            {"id": 10 * image + label, "image_id": image, "category_id": label, "bbox": [30 * label - 30, 0, 20, 20]}
            for image in (1, 2)
            for label in (1, 2, 3)
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(DATA, 1)],
    }
    detector: Any = SimpleNamespace(classes=model)
    return Evaluation(detector, truth, DATA, [metric], torch.device("cpu"), seen_only)


def detect(measured: Evaluation, model: tuple[str, ...], image: int) -> None:
    """Add the exact boxes of the model's classes; a class that the data lacks has the lorry's box."""
    at = [DATA.index(name) if name in DATA else 2 for name in model]
    boxes = torch.tensor([[30.0 * place, 0, 30 * place + 20, 20] for place in at])
    labels = torch.arange(1, len(model) + 1)
    measured.add_detections([image], [Detections(boxes, torch.ones(len(model)), labels)])


@pytest.mark.parametrize(("metric", "name"), [(CocoMetric, "AP"), (VocMetric, "mAP")])
def test_a_class_that_the_model_does_not_know_is_left_out_of_the_shared_value(metric: Any, name: str) -> None:
    model = ("bus", "dog", "cat")
    measured = evaluation(model, metric)
    for image in (1, 2):
        detect(measured, model, image)
    values = measured.compute()
    assert values[name] == pytest.approx(2 / 3)  # cat 1, dog 1, lorry 0
    assert values[f"shared_{name}"] == 1.0
    assert not [key for key in values if key.startswith("shared_") and "/" in key]


@pytest.mark.parametrize("model", [("lorry", "dog", "cat"), ("cat", "dog", "lorry", "bus")])
def test_a_model_that_knows_all_classes_has_one_value_only(model: tuple[str, ...]) -> None:
    measured = evaluation(model, CocoMetric)
    for image in (1, 2):
        detect(measured, model, image)
    values = measured.compute()
    assert values["AP"] == 1.0
    assert not [key for key in values if key.startswith("shared_")]


@pytest.mark.parametrize(("seen_only", "ap"), [(True, 1.0), (False, 51 / 101)])
def test_images_that_were_not_added_are_misses_unless_only_seen_images_count(seen_only: bool, ap: float) -> None:
    measured = evaluation(DATA, CocoMetric, seen_only)
    detect(measured, DATA, 2)
    assert measured.compute()["AP"] == pytest.approx(ap)  # precision 1 at recalls 0, 0.01, ..., 0.5 of 101


def test_no_shared_class_is_refused() -> None:
    with pytest.raises(DistillError, match="share no name"):
        evaluation(("Cat", "car"), CocoMetric)
