"""CocoMetric against pycocotools called by hand, the published fixture, and two processes, one without images."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from distill.evaluation.coco import CocoMetric
from distill.types import Detections, DistillError
from helpers.two_processes import run_in_two_processes

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
BACKENDS = ["faster_coco_eval", "pycocotools"]
CLASSES = ("cat", "dog", "owl", "never")
Case = tuple[dict[str, Any], list[int], list[Detections]]


def found(rows: Sequence[tuple[Sequence[float], float, int]], dtype: torch.dtype = torch.float64) -> Detections:
    boxes = torch.tensor([list(box) for box, _, _ in rows], dtype=dtype).reshape(-1, 4)
    return Detections(
        boxes, torch.tensor([row[1] for row in rows], dtype=dtype), torch.tensor([row[2] for row in rows]).long()
    )


def truth(objects: Sequence[dict[str, Any]], images: Sequence[int], classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    return {
        "images": [{"id": image, "width": 640, "height": 480} for image in images],
        "annotations": [{"id": index, **thing} for index, thing in enumerate(objects)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes, 1)],
    }


def thing(image: int, label: int, box: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": label, "bbox": list(box), **more}


def reference(case: Case) -> dict[str, float]:
    """pycocotools as its demo uses it, with ids and fields that it can stand; ``difficult`` is not known to it."""
    ground_truth, ids, detections = copy.deepcopy(case)
    coco, results = COCO(), COCO()
    for index, note in enumerate(ground_truth["annotations"], 1):
        note["id"] = index
        note["iscrowd"] = note.get("iscrowd", 0)
        note["area"] = note.get("area", note["bbox"][2] * note["bbox"][3])
    coco.dataset = ground_truth
    rows: list[dict[str, Any]] = []
    for image, entry in zip(ids, detections, strict=True):
        for (x1, y1, x2, y2), score, label in zip(*(part.tolist() for part in entry[:3]), strict=True):
            row = thing(image, label, [x1, y1, x2 - x1, y2 - y1], score=score, area=(x2 - x1) * (y2 - y1), iscrowd=0)
            rows.append({"id": len(rows) + 1, **row})
    results.dataset = {**ground_truth, "annotations": rows}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results.createIndex()
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = dict(zip(KEYS, map(float, evaluation.stats), strict=True))
    for k, category in enumerate(ground_truth["categories"]):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        numbers[f"AP/{category['name']}"] = float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0
    return numbers


def measure(case: Case, backend: str, **options: Any) -> dict[str, float]:
    ground_truth, ids, detections = case
    metric = CocoMetric(ground_truth, [c["name"] for c in ground_truth["categories"]], backend=backend, **options)
    for start in range(0, len(ids), 3):
        metric.update(ids[start : start + 3], detections[start : start + 3])
    return metric.compute()


def random_case(seed: int, images: int = 12, dtype: torch.dtype = torch.float64) -> Case:
    """Jittered truth, clutter, crowds, empty images, images without detections, and many equal scores and boxes."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(images) * int(rng.choice([1, 7, 2**40]))).tolist()
    objects, detections = [], []
    for image in ids:
        rows = []
        for _ in range(rng.integers(0, 9)):
            label = int(rng.integers(1, 4))
            box = np.round([*rng.uniform(0, 300, 2), *rng.choice([8, 32, 60, 96, 200], 2)], int(rng.integers(0, 3)))
            more: dict[str, Any] = {"iscrowd": int(rng.random() < 0.15)}
            if rng.random() < 0.7:
                more["area"] = float(rng.choice([32.0**2, 96.0**2, 0.6 * box[2] * box[3], box[2] * box[3]]))
            objects.append(thing(image, label, box.tolist(), **more))
            for _ in range(rng.integers(0, 4)):
                x, y, w, h = np.maximum(box + rng.normal(0, rng.choice([0, 2, 15]), 4), 0)
                score = float(np.round(rng.random(), int(rng.integers(0, 3))))
                rows.append(([x, y, x + w, y + h], score, int(label if rng.random() < 0.8 else rng.integers(1, 4))))
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = rng.uniform(0, 200, 4)
            rows.append(([x, y, x + w, y + h], float(np.round(rng.random(), 1)), int(rng.integers(1, 5))))
        detections.append(found(rows if rng.random() < 0.9 else [], dtype))
    return truth(objects, ids), ids, detections


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_equals_pycocotools_on_random_data(seed: int, backend: str) -> None:
    case = random_case(seed, dtype=torch.float32 if seed % 2 else torch.float64)
    numbers, expected = measure(case, backend, per_class=True), reference(case)
    assert list(numbers) == list(expected)
    assert numbers == pytest.approx(expected, rel=0, abs=1e-9)
    assert all(type(value) is float for value in numbers.values())


def corner_cases() -> dict[str, Case]:
    box, corners = [10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 30.0, 30.0]
    many = [([10.0, 10.0, 30.0, 30.0 + i / 50], 0.5, 1) for i in range(150)]
    edges = [32.0**2, 32.0**2 - 1e-6, 96.0**2, 96.0**2 + 1e-6, 0.0, 1e10, 2e10]
    return {
        "no objects, no detections": (truth([], [1]), [1], [found([])]),
        "no objects": (truth([], [1]), [1], [found([(corners, 0.9, 1)])]),
        "no detections": (truth([thing(1, 1, box)], [1]), [1], [found([])]),
        "never asked": (truth([thing(1, 1, box)], [1]), [], []),
        "annotation and image 0": (truth([thing(0, 1, box)], [0]), [0], [found([(corners, 0.9, 1)])]),
        "only a crowd": (truth([thing(1, 1, box, iscrowd=1)], [1]), [1], [found([(corners, 0.9, 1)] * 3)]),
        "twice found": (truth([thing(1, 1, box)], [1]), [1], [found([(corners, 0.9, 1)] * 2)]),
        "two objects, one place": (truth([thing(1, 1, box)] * 2, [1]), [1], [found([(corners, 0.9, 1)] * 3)]),
        "over a hundred": (truth([thing(1, 1, box)] * 3, [1]), [1], [found(many)]),
        "area edges": (
            truth([thing(1, 1, [i * 50.0, 0, 20, 20], area=area) for i, area in enumerate(edges)], [1]),
            [1],
            [found([([i * 50.0, 0, i * 50.0 + 20, 20], 0.5, 1) for i in range(len(edges))])],
        ),
        "exactly half": (truth([thing(1, 1, [0, 0, 10, 10])], [1]), [1], [found([([0, 0, 10, 5], 0.9, 1)])]),
        "zero areas": (truth([thing(1, 1, [5, 5, 0, 0])], [1]), [1], [found([([5, 5, 5, 5], 0.9, 1)])]),
        "zero score": (truth([thing(1, 1, box)], [1]), [1], [found([(corners, 0.0, 1)])]),
        "64-bit ids": (truth([thing(2**62 + 1, 1, box)], [2**62 + 1, 2**62]), [2**62, 2**62 + 1], [found([])] * 2),
        "another class": (truth([thing(1, 1, box)], [1]), [1], [found([(corners, 0.9, 2)])]),
    }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", corner_cases())
def test_equals_pycocotools_at_the_corners(name: str, backend: str) -> None:
    case = corner_cases()[name]
    assert measure(case, backend, per_class=True) == pytest.approx(reference(case), rel=0, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Two objects, one found at IoU 0.9 (right at the nine thresholds up to 0.9): precision 1 up to recall 1/2."""
    case = (
        truth([thing(1, 1, [0, 0, 10, 10]), thing(1, 1, [50, 50, 10, 10])], [1]),
        [1],
        [found([([0, 0, 10, 9], 1, 1)])],
    )
    numbers = measure(case, backend, per_class=True)
    assert numbers["AP50"] == pytest.approx(51 / 101)
    assert numbers["AP"] == pytest.approx(0.9 * 51 / 101)
    assert numbers["AR1"] == pytest.approx(0.45)
    assert numbers["APl"] == numbers["ARm"] == numbers["AP/dog"] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_difficult_objects_are_ignored_one_by_one(backend: str) -> None:
    """Each number below follows from: one match on a difficult object counts neither way, a second is wrong."""
    easy, hard = thing(1, 1, [0, 0, 10, 10]), thing(1, 1, [50, 50, 10, 10], difficult=1)
    first, second = ([0, 0, 10, 10], 0.5, 1), ([50, 50, 60, 60], 0.9, 1)
    part = ([50, 50, 54, 54], 0.9, 1)  # inside the difficult object, as a crowd would absorb it, but IoU 0.16
    assert measure((truth([easy, hard], [1]), [1], [found([first])]), backend)["AR100"] == 1
    assert measure((truth([easy, hard], [1]), [1], [found([first, second])]), backend)["AP"] == pytest.approx(1)
    assert measure((truth([easy, hard], [1]), [1], [found([first, second, second])]), backend)["AP"] == pytest.approx(
        0.5
    )
    assert measure((truth([easy, hard], [1]), [1], [found([first, part])]), backend)["AP"] == pytest.approx(0.5)
    assert measure((truth([hard], [1]), [1], [found([second])]), backend)["AP"] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_reproduces_the_published_numbers(backend: str) -> None:
    ground_truth, results, expected = load_fixture()
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    label = {category["id"]: index for index, category in enumerate(categories, 1)}
    ground_truth["categories"] = [{"id": label[c["id"]], "name": c["name"]} for c in categories]
    for note in ground_truth["annotations"]:
        note["category_id"] = label[note["category_id"]]
    rows: dict[int, list[Any]] = {image["id"]: [] for image in ground_truth["images"]}
    for row in results:
        x, y, w, h = row["bbox"]
        rows[row["image_id"]].append(([x, y, x + w, y + h], row["score"], label[row["category_id"]]))
    numbers = measure((ground_truth, list(rows), [found(entry) for entry in rows.values()]), backend)
    assert list(numbers.values()) == pytest.approx(expected, rel=0, abs=1e-6)


def load_fixture() -> tuple[dict[str, Any], list[dict[str, Any]], list[float]]:
    if "DISTILL_TEST_FIXTURES" not in os.environ:
        pytest.skip("DISTILL_TEST_FIXTURES is not set: it names the folder that holds eval_coco_val2014_100")
    folder = Path(os.environ["DISTILL_TEST_FIXTURES"], "eval_coco_val2014_100")
    names = ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json", "expected.json")
    ground_truth, results, expected = (json.loads((folder / name).read_text()) for name in names)
    return ground_truth, results, expected["bbox"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_silent_and_changes_nothing(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    case = random_case(3)
    ground_truth, detections = copy.deepcopy(case[0]), [entry.boxes.clone() for entry in case[2]]
    metric = CocoMetric(case[0], CLASSES, backend=backend)
    metric.update(case[1], case[2])
    first = metric.compute()
    metric.reset()
    metric.update(case[1], case[2])
    assert metric.compute() == first
    assert case[0] == ground_truth
    assert all(torch.equal(entry.boxes, boxes) for entry, boxes in zip(case[2], detections, strict=True))
    assert capfd.readouterr() == ("", "")


def test_order_and_batches_change_nothing() -> None:
    ground_truth, ids, detections = random_case(5)
    expected = measure((ground_truth, ids, detections), "auto")
    shuffled = [(ids[i], detections[i]) for i in np.random.default_rng(0).permutation(len(ids))]
    assert measure((ground_truth, [i for i, _ in shuffled], [d for _, d in shuffled]), "auto") == expected


def test_an_image_given_twice_counts_once() -> None:
    ground_truth, ids, detections = random_case(6)
    expected = measure((ground_truth, ids, detections), "auto")
    other = [found([([0, 0, 9, 9], 1.0, 1)])] * len(ids)
    assert measure((ground_truth, ids + ids + [ids[0]], detections + detections + [detections[0]]), "auto") == expected
    assert measure((ground_truth, ids + ids, detections + other), "auto") == expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_seen_only_leaves_out_what_was_not_given() -> None:
    box, hit = [0.0, 0.0, 10.0, 10.0], found([([0, 0, 10, 10], 0.9, 1)])
    case = (truth([thing(1, 1, box), thing(2, 1, box)], [1, 2]), [2], [hit])
    assert measure(case, "auto")["AR100"] == pytest.approx(0.5)
    assert measure(case, "auto", seen_only=True)["AR100"] == pytest.approx(1)
    assert set(measure((case[0], [], []), "auto", seen_only=True).values()) == {-1.0}


def test_half_precision_and_gradients_are_taken() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]], requires_grad=True)
    entry = Detections(
        boxes.bfloat16(), torch.tensor([0.5], requires_grad=True).half(), torch.tensor([1], dtype=torch.int32)
    )
    metric = CocoMetric(truth([thing(1, 1, [0, 0, 10, 10])], [1]), CLASSES)
    metric.update([1], [entry])
    assert not metric.boxes[0].requires_grad
    assert metric.compute()["AP"] == pytest.approx(1)
    assert metric.state_dict() == {}


def test_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CocoMetric(truth([], [1]), CLASSES).backend == "faster_coco_eval"
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert CocoMetric(truth([], [1]), CLASSES).backend == "pycocotools"
    with pytest.raises(DistillError, match="pip install faster-coco-eval"):
        CocoMetric(truth([], [1]), CLASSES, backend="faster_coco_eval")
    with pytest.raises(DistillError, match="among auto, faster_coco_eval, pycocotools, got 'coco'"):
        CocoMetric(truth([], [1]), CLASSES, backend="coco")


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ({"images": [], "annotations": []}, "'categories'"),
        (truth([], [1], ["cat", "dog"]), "Number the categories"),
        (truth([], [1], ["cat", "cat", "owl", "never"]), "Number the categories"),
        (truth([], [1, 1]), "1 twice"),
        (truth([thing(7, 1, [0, 0, 1, 1])], [1]), "other images: 7"),
        (truth([thing(1, 5, [0, 0, 1, 1])], [1]), "from 1 to 4, got 5"),
        (truth([thing(1, 0, [0, 0, 1, 1])], [1]), "from 1 to 4, got 0"),
    ],
)
def test_refuses_ground_truth_that_does_not_fit(ground_truth: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        CocoMetric(ground_truth, CLASSES)


NAN = float("nan")


@pytest.mark.parametrize(
    ("image", "entry", "message"),
    [
        (9, found([]), "other image ids: 9"),
        (1, found([([0, 0, 1, 1], 0.5, 0)]), "got 0 in images 1"),
        (1, found([([0, 0, 1, 1], 0.5, 5)]), "got 5 in images 1"),
        (1, found([([0, NAN, 1, 1], 0.5, 1)]), "in images 1"),
        (1, found([([0, 0, 1, 1], NAN, 1)]), "in images 1"),
        (1, found([([2, 0, 1, 1], 0.5, 1)]), "in images 1"),
    ],
)
def test_refuses_detections_that_cannot_be(image: int, entry: Detections, message: str) -> None:
    metric = CocoMetric(truth([], [1]), CLASSES)
    metric.update([image], [entry])
    with pytest.raises(DistillError, match=message):
        metric.compute()


def test_refuses_wrong_shapes() -> None:
    metric = CocoMetric(truth([], [1]), CLASSES)
    one = found([([0, 0, 1, 1], 0.5, 1)])
    with pytest.raises(DistillError, match="each of 2 image ids, got 1"):
        metric.update([1, 2], [one])
    for wrong in (
        one._replace(boxes=torch.zeros(1, 5)),
        one._replace(scores=torch.zeros(2)),
        one._replace(labels=torch.zeros(0)),
    ):
        with pytest.raises(DistillError, match="for image 1, got"):
            metric.update([1], [wrong])


def share(rank: int, case: Case, split: str) -> tuple[list[int], list[Detections]]:
    """What a rank sees: nothing on rank 0, or on rank 1; every other image, the first one on both; no boxes at all."""
    _, ids, detections = case
    if split == "no boxes on rank 1" and rank == 1:
        return ids[1::2], [found([]) for _ in ids[1::2]]
    if split.startswith("none on rank"):
        return ([], []) if split.endswith(str(rank)) else (ids, detections)
    return ids[rank::2] + ids[:1], detections[rank::2] + detections[:1]


def work(rank: int, folder: str, cases: dict[str, Case]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    answers = {}
    for split, case in cases.items():
        metric = CocoMetric(case[0], CLASSES, per_class=True)
        ids, detections = share(rank, case, split)
        for start in range(0, len(ids), 2):
            metric.update(ids[start : start + 2], detections[start : start + 2])
        first = metric.compute()
        metric.update((), ())  # forgets the answer, not the detections
        assert metric.compute() == first
        answers[split] = first
    torch.save(answers, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    case = random_case(8, images=5)
    silent: Case = (case[0], case[1], [d if i % 2 == 0 else found([]) for i, d in enumerate(case[2])])
    cases = {"even": case, "none on rank 0": case, "none on rank 1": case, "no boxes on rank 1": silent}
    cases["nothing at all"] = (case[0], case[1], [found([]) for _ in case[1]])
    run_in_two_processes(work, str(tmp_path), cases)
    answers: list[dict[str, dict[str, float]]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for split, entry in cases.items():
        expected = measure(entry, "auto", per_class=True)
        assert answers[0][split] == answers[1][split] == expected, split


def test_collecting_is_one_cat_per_batch() -> None:
    """The states grow by one tensor a batch, however many boxes there are."""
    many = Detections(torch.zeros(300, 4), torch.zeros(300), torch.ones(300, dtype=torch.int64))
    metric = CocoMetric(truth([], list(range(8))), CLASSES)
    metric.update(range(8), [many] * 8)
    states: list[Tensor] = [*metric.boxes, *metric.scores, *metric.labels, *metric.ids, *metric.counts]
    assert [tuple(state.shape) for state in states] == [(2400, 4), (2400,), (2400,), (8,), (8,)]
