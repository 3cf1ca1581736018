"""TIDE's breakdown against tidecv 1.0.1, its AP50 against COCO's, and Hoiem's shares on a case written by hand.

The numbers of tidecv come from ``pip install tidecv==1.0.1`` with ``tide = TIDE(); tide.evaluate(truth, results,
mode=TIDE.BOX)`` and ``next(iter(tide.runs.values())).fix_main_errors()``, in percent of AP50.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.analysis.errors import KINDS, ErrorBreakdown, break_down, hoiem_shares, similar_groups
from distill.evaluation.coco import CocoMetric
from distill.evaluation.matching import match
from distill.types import Detections
from helpers.detection_cases import arrays, random_case

CLASSES = ("cat", "dog", "owl")
TIDE_OF_RANDOM_CASE = (6.305473780714838, 10.019099908220209, 1.0506814825267128, 1.7374555673155143, 10.46074842300563)
"""Cls, Loc, Both, Dupe and Bkg of ``random_case(0, CLASSES)``, whose AP50 is 26.891564943431195."""
TIDE_OF_FIXTURE = (22.249761920897456, 0.23015459440682662, 0.0, 0.018972971237033676, 0.0, 8.525952163212736)
"""Cls, Loc, Both, Dupe, Bkg and Miss of the published results, whose AP50 is 64.20498881733425 by tidecv's mean."""


def percent(result: ErrorBreakdown) -> list[float]:
    return [100 * result.gain[kind] for kind in KINDS]


def tide_mean(result: ErrorBreakdown) -> list[float]:
    """The gains in percent by tidecv's mean, which counts classes with detections but without objects."""
    base = np.nanmean(result.class_ap["none"])
    return [100 * max(0.0, float(np.nanmean(result.class_ap[kind]) - base)) for kind in KINDS]


def test_gains_are_those_of_tidecv() -> None:
    result = break_down(*random_case(0, CLASSES), len(CLASSES))
    assert 100 * result.ap50 == pytest.approx(26.891564943431195)
    assert percent(result) == pytest.approx([*TIDE_OF_RANDOM_CASE, 8.435076859053186])
    # tidecv counts 9 and 35 for Both and Bkg: it also counts detections in crowds, which cost no AP
    assert list(result.counts.values()) == [7, 12, 7, 11, 32, 10]


def test_gains_on_published_results_are_those_of_tidecv() -> None:
    if "DISTILL_TEST_FIXTURES" not in os.environ:
        pytest.skip("DISTILL_TEST_FIXTURES is not set: it names the folder that holds eval_coco_val2014_100")
    folder = Path(os.environ["DISTILL_TEST_FIXTURES"], "eval_coco_val2014_100")
    content = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    categories = sorted(content["categories"], key=lambda row: row["id"])
    label = {row["id"]: index for index, row in enumerate(categories, start=1)}
    rows: dict[bool, list[tuple[int, int, list[float]]]] = {True: [], False: []}
    for note in content["annotations"]:
        x, y, w, h = note["bbox"]
        rows[bool(note["iscrowd"])].append((note["image_id"], label[note["category_id"]], [x, y, x + w, y + h]))
    # Many scores are equal, and tidecv ranks equal ones by the kind of error: both got scores without equal ones.
    detections = []
    for index, row in enumerate(sorted(results, key=lambda row: row["image_id"])):
        x, y, w, h = row["bbox"]
        box = [x, y, x + w, y + h]
        detections.append((row["image_id"], label[row["category_id"]], box, row["score"] - 1e-9 * index))
    names = [row["name"] for row in categories]
    case = arrays(names, [image["id"] for image in content["images"]], rows[False], detections, rows[True])
    result = break_down(*case, len(names))
    assert 100 * np.nanmean(result.class_ap["none"]) == pytest.approx(64.20498881733425)
    assert tide_mean(result) == pytest.approx(TIDE_OF_FIXTURE)
    assert list(result.counts.values()) == [83, 1, 0, 1, 0, 97]
    expected = json.loads((folder / "expected.json").read_text())["bbox"][1]  # published AP50, of equal scores
    assert result.ap50 == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("seed", range(1, 6))
def test_ap50_is_that_of_coco(seed: int) -> None:
    truth, detections = random_case(seed, CLASSES)
    content = {
        "images": [{"id": image} for image in truth.images.tolist()],
        "annotations": [
            {"image_id": image, "category_id": label, "bbox": box, "iscrowd": int(crowd)}
            for image, label, box, crowd in zip(
                *(column.tolist() for column in (truth.image, truth.label, truth.box, truth.crowd)), strict=True
            )
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, start=1)],
    }
    metric = CocoMetric(content, CLASSES, backend="pycocotools")
    for image in truth.images.tolist():
        rows = detections.image == image
        columns = (detections.box, detections.score, detections.label)
        metric.update([image], [Detections(*(torch.from_numpy(column[rows]) for column in columns))])
    assert break_down(truth, detections, len(CLASSES)).ap50 == pytest.approx(metric.compute()["AP50"])


def test_nothing_to_measure() -> None:
    result = break_down(*arrays(CLASSES, [1], [], []), len(CLASSES))
    assert result.ap50 == -1
    assert set(result.gain.values()) == {0}
    only_objects = break_down(*arrays(CLASSES, [1], [(1, 1, (0, 0, 9, 9))], []), len(CLASSES))
    assert (only_objects.ap50, only_objects.counts["missed"]) == (0, 1)


def test_a_difficult_object_is_neither_right_nor_wrong() -> None:
    box = (0, 0, 10, 10)
    case = arrays(CLASSES, [1], [], [(1, 1, box, 0.9), (1, 1, (50, 50, 60, 60), 0.5)], difficult=[(1, 1, box)])
    matches = match(*case)
    assert matches.counted.tolist() == [False, True]
    assert not matches.correct.any()


def test_shares_of_the_best_detections() -> None:
    square, moved, inside = (0, 0, 10, 10), (0, 5, 10, 15), (100, 100, 110, 110)
    objects = [(1, 1, square), (1, 2, inside), (2, 3, square), *((3, 1, (30 * i, 0, 30 * i + 9, 9)) for i in range(5))]
    detections = [
        (1, 1, square, 0.99),  # correct
        (1, 1, square, 0.98),  # a duplicate counts as badly localized
        (1, 1, moved, 0.97),  # IoU of 1/3
        (1, 1, inside, 0.96),  # a dog
        (2, 1, moved, 0.95),  # an owl
        (2, 1, (200, 200, 210, 210), 0.94),  # nothing
        (2, 1, (200, 200, 210, 210), 0.93),  # the seventh detection of six objects
    ]
    shares = hoiem_shares(*arrays(CLASSES, [1, 2, 3], objects, detections), CLASSES, [["cat", "dog"]])
    assert shares["cat"].counts == {"correct": 1, "localization": 2, "similar": 1, "other": 1, "background": 1}
    assert shares["cat"].detections == 6
    assert shares["dog"].detections == 0
    without_groups = hoiem_shares(*arrays(CLASSES, [1, 2, 3], objects, detections), CLASSES)
    assert without_groups["cat"].counts["other"] == 2


def test_groups_of_similar_classes() -> None:
    assert similar_groups(["cat", "aeroplane", "dog", "circle", "bus"], []) == [["cat", "dog"], ["aeroplane", "bus"]]
    assert similar_groups(["cat", "dog"], [["cat", "circle"]]) == [["cat", "circle"]]
