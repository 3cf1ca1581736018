"""The bootstrap over images against data sets that really hold each drawn image so many times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.analysis.image_bootstrap import bootstrap_ap, difference_interval, match_detections, resampled_ap
from distill.evaluation.coco import CocoMetric
from distill.evaluation.metric import DetectionArrays, GroundTruth, parse_ground_truth
from distill.evaluation.recording import Recording
from helpers.recordings import CLASSES, random_recording


def ground_truth(images: Any) -> dict[str, Any]:
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
    return {"images": [{"id": image} for image in images], "annotations": [], "categories": categories}


def repeated(recording: Recording, times: Any) -> tuple[GroundTruth, DetectionArrays]:
    """The data set that holds each image so many times, under new ids."""
    truth, found = recording.truth, recording.detections
    parts: list[tuple[GroundTruth, DetectionArrays]] = []
    number = 0
    for image, count in zip(truth.images, times, strict=True):
        for _ in range(count):
            one = truth.of_images(np.array([image]))
            rows = found.image == image
            number += 1
            detections = DetectionArrays._make(column[rows] for column in found)
            ids = np.full(len(one.image), number), np.full(rows.sum(), number)
            parts.append((one._replace(images=np.array([number]), image=ids[0]), detections._replace(image=ids[1])))
    truths, founds = zip(*parts, strict=True)
    return (
        GroundTruth._make(np.concatenate(columns) for columns in zip(*truths, strict=True)),
        DetectionArrays._make(np.concatenate(columns) for columns in zip(*founds, strict=True)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_has_the_ap_of_the_data_set_with_repeated_images(seed: int) -> None:
    recording = random_recording(seed)
    draw = np.random.default_rng(seed)
    weights = np.stack([np.ones(12, dtype=np.int64), *draw.multinomial(12, np.full(12, 1 / 12), size=5)])
    values = resampled_ap(match_detections(recording), weights)
    for times, value in zip(weights, values, strict=True):
        truth, found = repeated(recording, times)
        metric = CocoMetric(ground_truth(truth.images), CLASSES)
        assert value == pytest.approx(metric.evaluate(truth, found)["AP"], abs=1e-12)
    assert len(set(values.tolist())) > 3


def test_many_resamples_at_once_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = random_recording(5)
    whole = bootstrap_ap(recording, resamples=40)
    monkeypatch.setattr("distill.analysis.image_bootstrap.CHUNK", 1)
    assert bootstrap_ap(recording, resamples=40).tolist() == whole.tolist()
    assert bootstrap_ap(recording, resamples=40, seed=1).tolist() != whole.tolist()


def test_the_interval_of_equal_models_is_zero_and_that_of_a_better_one_above_it() -> None:
    model = random_recording(2, images=60, crowds=False)
    draw = np.random.default_rng(0)
    kept = draw.random(len(model.detections.label)) < 0.5
    weaker = Recording(CLASSES, model.truth, DetectionArrays._make(column[kept] for column in model.detections))
    ours, theirs = bootstrap_ap(model, 200), bootstrap_ap(weaker, 200)
    assert difference_interval(ours, ours) == (0.0, 0.0, 0.0)
    gain, loss = difference_interval(ours, theirs), difference_interval(theirs, ours)
    assert gain is not None
    assert loss is not None
    assert 0 < gain.low < gain.mean < gain.high
    assert (loss.low, loss.mean, loss.high) == pytest.approx((-gain.high, -gain.mean, -gain.low))


def test_there_is_no_interval_without_objects() -> None:
    recording = random_recording(0)
    nothing = recording.truth.of_labels([])
    values = bootstrap_ap(Recording(CLASSES, nothing, recording.detections), 3)
    assert values.tolist() == [-1.0] * 4
    assert difference_interval(values, values) is None


def test_the_published_ap_of_the_coco_fixture() -> None:
    """The 100 images of COCO's own example, whose AP was published as 0.505."""
    if "DISTILL_TEST_FIXTURES" not in os.environ:
        pytest.skip("DISTILL_TEST_FIXTURES is not set: it names the folder that holds eval_coco_val2014_100")
    folder = Path(os.environ["DISTILL_TEST_FIXTURES"], "eval_coco_val2014_100")
    content = json.loads((folder / "instances_val2014_100.json").read_text())
    (expected,) = json.loads((folder / "expected.json").read_text())["bbox"][:1]
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    labels = {category["id"]: label for label, category in enumerate(content["categories"], 1)}
    names = [category["name"] for category in content["categories"]]
    for row in (*content["annotations"], *results):
        row["category_id"] = labels[row["category_id"]]
    content["categories"] = [{"id": label, "name": name} for label, name in enumerate(names, 1)]
    rows = sorted(results, key=lambda row: row["image_id"])
    box = np.array([row["bbox"] for row in rows])
    box[:, 2:] += box[:, :2]
    found = DetectionArrays(
        image=np.array([row["image_id"] for row in rows]),
        label=np.array([row["category_id"] for row in rows]),
        box=box,
        score=np.array([row["score"] for row in rows]),
        code=np.full(len(rows), None, dtype=object),
    )
    recording = Recording(tuple(names), parse_ground_truth(content, names), found)
    assert bootstrap_ap(recording, 1)[0] == pytest.approx(expected, abs=1e-9)
