"""VocMetric against a slow loop written from the development kit's rules, numbers by hand, and the toy fixture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.evaluation.matching import average_precision
from distill.evaluation.voc import VocMetric
from distill.types import Detections, DistillError

CLASSES = ("cat", "dog", "never")
Row = tuple[list[float], float, int]
Case = tuple[dict[str, Any], list[int], list[list[Row]]]


def found(rows: Sequence[Row]) -> Detections:
    boxes = torch.tensor([box for box, _, _ in rows], dtype=torch.float64).reshape(-1, 4)
    scores = torch.tensor([score for _, score, _ in rows], dtype=torch.float64)
    return Detections(boxes, scores, torch.tensor([label for _, _, label in rows]).long())


def truth(objects: Sequence[dict[str, Any]], images: Sequence[int], classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    return {"images": [{"id": image} for image in images], "annotations": list(objects), "categories": categories}


def thing(image: int, label: int, box: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": label, "bbox": list(box), **more}


def measure(case: Case, **options: Any) -> dict[str, float]:
    ground_truth, ids, detections = case
    metric = VocMetric(ground_truth, [category["name"] for category in ground_truth["categories"]], **options)
    metric.update(ids, [found(rows) for rows in detections])
    return metric.compute()


def overlap(a: Sequence[float], b: Sequence[float], extra: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0] + extra) * (c[3] - c[1] + extra) for c in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def slow_hits(case: Case, label: int, iou: float, extra: int) -> tuple[list[bool], int]:
    """The rules, one detection at a time: true or false positives best first, and the number of objects."""
    ground_truth, ids, detections = case
    things = [note for note in ground_truth["annotations"] if note["category_id"] == label]
    easy = [not note.get("difficult") and not note.get("iscrowd") for note in things]
    entries = [
        (-score, image, place, box)
        for image, rows in zip(ids, detections, strict=True)
        for place, (box, score, kind) in enumerate(rows)
        if kind == label
    ]
    hits, taken = [], set()
    for _, image, _, box in sorted(entries):
        best, where = 0.0, -1
        for index, note in enumerate(things):
            x, y, w, h = note["bbox"]
            value = overlap(box, [x, y, x + w, y + h], extra) if note["image_id"] == image else 0.0
            if value > best:
                best, where = value, index
        if where >= 0 and best >= iou and not easy[where]:
            continue
        hits.append(where >= 0 and best >= iou and where not in taken)
        if hits[-1]:
            taken.add(where)
    return hits, sum(easy)


def slow_ap(hits: Sequence[bool], positives: int, eleven_point: bool) -> float:
    """Best precision at or beyond each recall, averaged or integrated; recall points are floats, as published."""
    if positives == 0:
        return -1.0
    right = [sum(hits[: n + 1]) for n in range(len(hits))]
    recalls = [t * 0.1 for t in range(11)] if eleven_point else [t / positives for t in range(1, positives + 1)]
    best = [
        max((Fraction(k, n) for n, k in enumerate(right, 1) if k / positives >= at), default=Fraction(0))
        for at in recalls
    ]
    return float(sum(best) / len(recalls))


def slow(case: Case, iou: float = 0.5, eleven_point: bool = False, inclusive: bool = False) -> dict[str, float]:
    names = [category["name"] for category in case[0]["categories"]]
    values = [slow_ap(*slow_hits(case, label, iou, int(inclusive)), eleven_point) for label in range(1, len(names) + 1)]
    measured = [value for value in values if value >= 0]
    mean = sum(measured) / len(measured) if measured else -1.0
    return {"mAP": mean, **{f"mAP/{name}": value for name, value in zip(names, values, strict=True)}}


def random_case(seed: int) -> Case:
    """Integer boxes, so that overlaps tie and meet the threshold exactly; few scores; difficult ones; crowds."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(10) * int(rng.choice([1, 3, 2**45]))).tolist()
    objects, detections = [], []
    for image in ids:
        rows: list[Row] = []
        for _ in range(rng.integers(0, 7)):
            label, box = int(rng.integers(1, 3)), rng.integers([0, 0, 1, 1], [30, 30, 12, 12]).astype(float)
            flags = {"difficult": int(rng.random() < 0.25), "iscrowd": int(rng.random() < 0.1)}
            objects.append(thing(image, label, box.tolist(), **flags))
            for _ in range(rng.integers(0, 4)):
                x, y, w, h = np.maximum(box + rng.integers(-2, 3, 4), 0).tolist()
                rows.append(([x, y, x + w, y + h], float(rng.integers(0, 5)) / 4, label))
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = rng.integers(0, 30, 4).astype(float).tolist()
            rows.append(([x, y, x + w, y + h], float(rng.integers(0, 5)) / 4, int(rng.integers(1, 4))))
        detections.append(rows)
    return truth(objects, ids), ids, detections


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("iou", [0.1, 0.5, 0.75, 1.0])
def test_equals_the_slow_loop(iou: float, eleven_point: bool, inclusive: bool) -> None:
    for seed in range(8):
        case = random_case(seed)
        options: dict[str, Any] = {"iou": iou, "eleven_point": eleven_point, "inclusive": inclusive}
        assert measure(case, **options) == pytest.approx(slow(case, **options), rel=0, abs=1e-12), seed


def test_by_hand() -> None:
    """Three objects, ranked right, wrong, right, one never found: area 1/3 + 1/3 * 2/3, eleven points 4 + 3 * 2/3."""
    box = [0.0, 0.0, 10.0, 10.0]
    rows: list[Row] = [([0, 0, 10, 10], 0.9, 1), ([30, 30, 40, 40], 0.8, 1), ([50, 50, 60, 60], 0.7, 1)]
    case = (truth([thing(1, 1, box), thing(1, 1, [50, 50, 10, 10]), thing(1, 1, [80, 80, 10, 10])], [1]), [1], [rows])
    assert measure(case) == pytest.approx({"mAP": 5 / 9, "mAP/cat": 5 / 9, "mAP/dog": -1, "mAP/never": -1})
    assert measure(case, eleven_point=True)["mAP"] == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert list(measure(case, per_class=False)) == ["mAP"]


def test_matching_rules_by_hand() -> None:
    exact, twice = ([0.0, 0.0, 10.0, 10.0], 0.9, 1), ([0.0, 0.0, 10.0, 10.0], 0.8, 1)
    one, hard = thing(1, 1, [0, 0, 10, 10]), thing(1, 1, [0, 0, 10, 10], difficult=1)
    other = thing(1, 1, [50, 50, 10, 10])
    last = ([50.0, 50.0, 60.0, 60.0], 0.1, 1)
    # The second find of one object is wrong: the last right one comes third.
    assert measure((truth([one, other], [1]), [1], [[exact, twice, last]]))["mAP"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    # On a difficult object any number of finds count neither way, and it need not be found.
    assert measure((truth([hard, other], [1]), [1], [[exact, twice, last]]))["mAP"] == 1
    assert measure((truth([hard, other], [1]), [1], [[last]]))["mAP"] == 1
    # Overlap of exactly the threshold is enough.
    assert measure((truth([one], [1]), [1], [[([0.0, 0.0, 10.0, 5.0], 0.9, 1)]]))["mAP"] == 1
    assert measure((truth([one], [1]), [1], [[([0.0, 0.0, 10.0, 4.99], 0.9, 1)]]))["mAP"] == 0
    # A detection never falls back on its second-best object, even when the best is taken.
    near = thing(1, 1, [0, 1, 10, 10])
    assert measure((truth([one, near], [1]), [1], [[exact, twice]]))["mAP"] == pytest.approx(0.5)


def test_half_open_boxes_equal_the_development_kit_on_raw_ones() -> None:
    """Taking 1 off xmin and ymin alone makes plain areas equal the kit's inclusive ones."""
    for seed in range(4):
        raw = random_case(seed)
        ground_truth, ids, detections = raw
        notes = [
            dict(note, bbox=[x - 1, y - 1, w + 1, h + 1])
            for note in ground_truth["annotations"]
            for x, y, w, h in [note["bbox"]]
        ]
        rows = [
            [([x1 - 1, y1 - 1, x2, y2], score, label) for (x1, y1, x2, y2), score, label in entry]
            for entry in detections
        ]
        assert measure((truth(notes, ids), ids, rows)) == measure(raw, inclusive=True)


def test_ties_rank_by_image_id_whatever_the_order_of_batches() -> None:
    """Equal scores: the wrong one of image 5 comes after the right one of image 2."""
    ground_truth = truth([thing(2, 1, [0, 0, 10, 10])], [5, 2])
    right: list[Row] = [([0.0, 0.0, 10.0, 10.0], 0.5, 1)]
    for ids in ([5, 2], [2, 5]):
        assert measure((ground_truth, ids, [right, right]))["mAP"] == 1
    assert measure((truth([thing(5, 1, [0, 0, 10, 10])], [5, 2]), [5, 2], [right, right]))["mAP"] == 0.5


def test_the_eleven_points_are_floating_point() -> None:
    """3 * 0.1 > 3 / 10 in float64, and likewise at 6 and 7; the toy set below holds such a recall."""
    for reached in range(1, 10):
        points = reached + 1 - (reached in (3, 6, 7))
        for objects in (10, 30):
            hits = np.ones(reached * objects // 10, dtype=np.bool_)
            assert average_precision(hits, objects, np.arange(11) * 0.1) == pytest.approx(points / 11)


def test_empty_things() -> None:
    assert set(measure((truth([], [1]), [1], [[]])).values()) == {-1.0}
    assert set(measure((truth([], [1]), [], [])).values()) == {-1.0}
    assert measure((truth([thing(1, 1, [0, 0, 5, 5])], [1]), [], []))["mAP"] == 0
    assert measure((truth([thing(1, 1, [0, 0, 5, 5])], [1]), [1], [[]]), eleven_point=True)["mAP"] == 0
    wrong: list[Row] = [([0.0, 0.0, 5.0, 5.0], 0.5, 2)]
    assert measure((truth([thing(1, 1, [0, 0, 5, 5])], [1]), [1], [wrong])) == {
        "mAP": 0,
        "mAP/cat": 0,
        "mAP/dog": -1,
        "mAP/never": -1,
    }
    flat: list[Row] = [([3.0, 3.0, 3.0, 3.0], 0.5, 1)]
    assert measure((truth([thing(1, 1, [3, 3, 0, 0])], [1]), [1], [flat]))["mAP"] == 0
    assert measure((truth([thing(1, 1, [3, 3, 0, 0])], [1]), [1], [flat]), inclusive=True)["mAP"] == 1


@pytest.mark.parametrize("iou", [0.0, -1.0, 1.5])
def test_refuses_an_iou_that_cannot_be(iou: float) -> None:
    with pytest.raises(DistillError, match=r"IoU in \(0, 1\]"):
        VocMetric(truth([], [1]), CLASSES, iou=iou)


@pytest.mark.parametrize(("form", "eleven_point"), [("voc07_11pt", True), ("voc10_area", False)])
def test_reproduces_the_toy_set(form: str, eleven_point: bool) -> None:
    if "DISTILL_TEST_FIXTURES" not in os.environ:
        pytest.skip("DISTILL_TEST_FIXTURES is not set: it names the folder that holds eval_voc_toy")
    folder = Path(os.environ["DISTILL_TEST_FIXTURES"], "eval_voc_toy")
    files = sorted((folder / "gts").glob("*.txt"))
    objects, rows = [], []
    for image, file in enumerate(files):
        objects += [thing(image, 1, list(map(float, line.split()[1:]))) for line in file.read_text().splitlines()]
        entries = [
            list(map(float, line.split()[1:])) for line in (folder / "dets" / file.name).read_text().splitlines()
        ]
        rows.append([([x, y, x + w, y + h], score, 1) for score, x, y, w, h in entries])
    case = (truth(objects, range(len(files)), ["object"]), list(range(len(files))), rows)
    expected = json.loads((folder / "expected.json").read_text())[form]
    for iou, value in expected.items():
        numbers = measure(case, iou=float(iou), eleven_point=eleven_point, inclusive=True)
        assert numbers["mAP"] == pytest.approx(value, rel=0, abs=1e-9), iou
        assert numbers["mAP"] == pytest.approx(slow(case, float(iou), eleven_point, True)["mAP"], rel=0, abs=1e-12)
