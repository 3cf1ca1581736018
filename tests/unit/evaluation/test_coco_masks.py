"""Mask AP against the published numbers, pycocotools called by hand, and two processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from distill.data import rle
from distill.evaluation.coco import CocoMetric
from distill.types import Detections, DistillError
from helpers.two_processes import run_in_two_processes

BACKENDS = ["faster_coco_eval", "pycocotools"]
CLASSES = ("cat", "dog")
SIZE = (40, 50)
KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def found(masks: torch.Tensor, scores: list[float], labels: list[int]) -> Detections:
    """Boxes are all the same, so that nothing but masks can tell detections apart."""
    boxes = torch.tensor([[0.0, 0.0, SIZE[1], SIZE[0]]] * len(scores)).reshape(-1, 4)
    return Detections(boxes, torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), masks)


def rectangle(x1: int, y1: int, x2: int, y2: int) -> torch.Tensor:
    mask = torch.zeros(*SIZE, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def truth(notes: list[dict[str, Any]], images: list[int]) -> dict[str, Any]:
    return {
        "images": [{"id": image, "height": SIZE[0], "width": SIZE[1]} for image in images],
        "annotations": notes,
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)],
    }


def thing(image: int, mask: torch.Tensor, label: int = 1, **more: Any) -> dict[str, Any]:
    code = rle.to_coco(rle.encode_masks(mask[None])[0], SIZE)
    box = [0, 0, SIZE[1], SIZE[0]]
    note = {"image_id": image, "category_id": label, "bbox": box, "segmentation": code, "area": int(mask.sum())}
    return {**note, **more}


def measure(ground_truth: dict[str, Any], entries: dict[int, Detections], **options: Any) -> dict[str, float]:
    metric = CocoMetric(ground_truth, [each["name"] for each in ground_truth["categories"]], masks=True, **options)
    images = list(entries)
    for start in range(0, len(images), 3):
        part = images[start : start + 3]
        metric.update(part, [entries[image] for image in part])
    return metric.compute()


def load_fixture() -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[float]]]:
    if "DISTILL_TEST_FIXTURES" not in os.environ:
        pytest.skip("DISTILL_TEST_FIXTURES is not set: it names the folder that holds eval_coco_val2014_100")
    folder = Path(os.environ["DISTILL_TEST_FIXTURES"], "eval_coco_val2014_100")
    names = ("instances_val2014_100.json", "instances_val2014_fakesegm100_results.json", "expected.json")
    ground_truth, results, expected = (json.loads((folder / name).read_text()) for name in names)
    return ground_truth, results, expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_reproduces_the_published_numbers(backend: str) -> None:
    ground_truth, results, expected = load_fixture()
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    label = {category["id"]: index for index, category in enumerate(categories, 1)}
    ground_truth["categories"] = [{"id": label[each["id"]], "name": each["name"]} for each in categories]
    for note in ground_truth["annotations"]:
        note["category_id"] = label[note["category_id"]]
    assert any(note["iscrowd"] for note in ground_truth["annotations"])
    entries = {}
    for image in ground_truth["images"]:
        rows = [row for row in results if row["image_id"] == image["id"]]
        masks = [torch.from_numpy(coco.decode(row["segmentation"])).bool() for row in rows]
        boxes = torch.tensor([coco.toBbox(row["segmentation"]).tolist() for row in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        entries[image["id"]] = Detections(
            boxes,
            torch.tensor([row["score"] for row in rows], dtype=torch.float64),
            torch.tensor([label[row["category_id"]] for row in rows], dtype=torch.int64),
            torch.stack(masks) if masks else torch.zeros(0, image["height"], image["width"]),
        )
    numbers = measure(ground_truth, entries, backend=backend)
    mine = [numbers[f"mask_{key}"] for key in KEYS]
    assert mine == pytest.approx(expected["segm"], rel=0, abs=1e-6)


def random_case(seed: int, images: int = 10) -> tuple[dict[str, Any], dict[int, Detections]]:
    """Shifted and clipped rectangles, crowds, equal scores, images without objects or detections."""
    rng, notes, entries = np.random.default_rng(seed), [], {}
    for image in range(images):
        masks, scores, labels = [], [], []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = (rng.integers(low, high) for low, high in ((0, 35), (0, 25), (3, 40), (3, 30)))
            label = int(rng.integers(1, 3))
            notes.append(thing(image, rectangle(x, y, x + w, y + h), label, iscrowd=int(rng.random() < 0.2)))
            for _ in range(rng.integers(0, 3)):
                dx, dy = rng.integers(0, 4, 2)
                masks.append(rectangle(x + dx, y + dy, x + w, y + h + dy))
                scores.append(round(float(rng.random()), 1))
                labels.append(label)
        stacked = torch.stack(masks) if masks else torch.zeros(0, *SIZE, dtype=torch.bool)
        entries[image] = found(stacked, scores, labels)
    return truth(notes, list(range(images))), entries


def reference(ground_truth: dict[str, Any], entries: dict[int, Detections]) -> dict[str, float]:
    """pycocotools as its demo uses it."""
    target = COCO()
    target.dataset = {
        **ground_truth,
        "annotations": [dict(n, id=i) for i, n in enumerate(ground_truth["annotations"], 1)],
    }
    for note in target.dataset["annotations"]:
        note.setdefault("iscrowd", 0)
    rows = []
    for image, entry in entries.items():
        assert entry.masks is not None
        for mask, score, label in zip(entry.masks, entry.scores.tolist(), entry.labels.tolist(), strict=True):
            code = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            rows.append({"image_id": image, "category_id": label, "segmentation": code, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        target.createIndex()
        evaluation = COCOeval(target, target.loadRes(rows), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {f"mask_{key}": float(value) for key, value in zip(KEYS, evaluation.stats, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(5))
def test_equals_pycocotools_on_random_data(seed: int, backend: str) -> None:
    ground_truth, entries = random_case(seed)
    numbers = measure(ground_truth, entries, backend=backend, per_class=True)
    expected = reference(ground_truth, entries)
    assert 0 < expected["mask_AP"] < 1
    assert {key: numbers[key] for key in expected} == pytest.approx(expected, rel=0, abs=1e-9)
    assert {"mask_AP/cat", "mask_AP/dog"} <= numbers.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """An object of 10 x 10 and a mask of 10 x 9: pixel overlap 0.9, correct at nine of ten thresholds; equal boxes."""
    ground_truth = truth([thing(1, rectangle(0, 0, 10, 10))], [1])
    numbers = measure(ground_truth, {1: found(rectangle(0, 0, 10, 9)[None], [0.9], [1])}, backend=backend)
    assert numbers["mask_AP"] == pytest.approx(0.9)
    assert numbers["AP"] == pytest.approx(1)
    crowd = thing(1, rectangle(20, 20, 50, 40), iscrowd=1)
    masks = torch.stack([rectangle(0, 0, 10, 10), *[rectangle(20 + i, 20, 25 + i, 25) for i in range(4)]])
    numbers = measure(
        truth([ground_truth["annotations"][0], crowd], [1]), {1: found(masks, [0.1, 0.9, 0.9, 0.9, 0.9], [1] * 5)}
    )
    assert numbers["mask_AP"] == pytest.approx(1)  # the crowd absorbs what lies in it


@pytest.mark.parametrize("backend", BACKENDS)
def test_polygons_of_a_file_are_measured_as_they_stand(backend: str) -> None:
    polygon = [[0, 0, 10, 0, 10, 10, 0, 10]]
    note = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "segmentation": polygon}
    numbers = measure(truth([note], [1]), {1: found(rectangle(0, 0, 10, 10)[None], [0.9], [1])}, backend=backend)
    assert numbers["mask_AP"] == pytest.approx(1)


def test_a_detector_without_masks_has_box_numbers_only() -> None:
    ground_truth, entries = random_case(3)
    bare = {image: entry._replace(masks=None) for image, entry in entries.items()}
    numbers, whole = measure(ground_truth, bare), measure(ground_truth, entries)
    assert {key: numbers[key] for key in KEYS} == {key: whole[key] for key in KEYS}
    assert {numbers[f"mask_{key}"] for key in KEYS} == {-1.0}


def test_masks_are_not_coded_unless_asked_for() -> None:
    ground_truth, entries = random_case(3)
    metric = CocoMetric(ground_truth, CLASSES)
    metric.update(list(entries), list(entries.values()))
    assert not any(key.startswith("mask_") for key in metric.compute())
    assert not hasattr(metric, "codes")


def test_a_repeated_image_and_the_order_change_nothing() -> None:
    ground_truth, entries = random_case(4)
    expected = measure(ground_truth, entries)
    metric = CocoMetric(ground_truth, CLASSES, masks=True)
    for image in [*reversed(entries), 0, 1]:
        metric.update([image], [entries[image]])
    assert metric.compute() == expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_given_is_zero_and_seen_only_measures_what_was_given() -> None:
    ground_truth, entries = random_case(4)
    assert CocoMetric(ground_truth, CLASSES, masks=True).compute()["mask_AP"] == 0
    metric = CocoMetric(ground_truth, CLASSES, masks=True, seen_only=True)
    assert metric.compute()["mask_AP"] == -1
    part = {image: entries[image] for image in (0, 1, 2)}
    assert set(measure(ground_truth, part, seen_only=True)) == set(measure(ground_truth, entries))


def test_what_does_not_fit_is_refused() -> None:
    whole = thing(1, rectangle(0, 0, 10, 10))
    bare = {key: value for key, value in whole.items() if key != "segmentation"}
    with pytest.raises(DistillError, match=r"annotation 1 \(image 1\) needs polygons.*data.masks=true"):
        CocoMetric(truth([whole, bare], [1]), CLASSES, masks=True)
    with pytest.raises(DistillError, match=r"'height' and 'width'"):
        CocoMetric({**truth([whole], [1]), "images": [{"id": 1}]}, CLASSES, masks=True)
    metric = CocoMetric(truth([whole], [1]), CLASSES, masks=True)
    with pytest.raises(DistillError, match=r"\(1, 40, 50\) for image 1.*got \(1, 50, 40\)"):
        metric.update([1], [found(rectangle(0, 0, 10, 10).T[None], [0.9], [1])])


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    ground_truth, entries = random_case(8)
    answers = []
    for own in (
        [list(entries)[rank::2], list(entries)[:1]],
        [list(entries)] if rank else [],
        [[9], [8]] if rank else [[0]],
    ):
        metric = CocoMetric(ground_truth, CLASSES, masks=True)
        for part in own:
            metric.update(part, [entries[image] for image in part])
        answers.append(metric.compute())
    torch.save(answers, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_even_if_one_of_them_has_no_images(tmp_path: Path) -> None:
    run_in_two_processes(work, str(tmp_path))
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    ground_truth, entries = random_case(8)
    expected = measure(ground_truth, entries)
    assert answers[0] == answers[1]
    assert answers[0][:2] == [expected, expected]
    assert answers[0][2] == measure(ground_truth, {image: entries[image] for image in (0, 8, 9)})
