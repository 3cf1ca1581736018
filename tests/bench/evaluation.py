"""Compares our AP of a COCO-sized evaluation with pycocotools on synthetic detections: seconds, ratio and numbers.

    python tests/bench/evaluation.py [--images 5000] [--detections 100] [--classes 80] [--masks]

Our time runs from the first `update` to the numbers. The time of pycocotools starts from tensors in memory: the list of
COCO results, `loadRes`, `evaluate`, `accumulate` and `summarize`. Both include reading the ground truth from a dict.
With `--masks` every object and detection has the disc in its box as a mask; our code encodes the masks, pycocotools
gets codes.

Then the script measures what collecting 100 detections per image adds to inference, in the most expensive case: a
ResNet-18 Faster R-CNN at 320 pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

import distill
from distill.evaluation.coco import CocoMetric
from distill.evaluation.evaluate import Evaluation
from distill.types import Detections

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SIDE = 640
Array = np.ndarray[Any, Any]


def boxes(rng: np.random.Generator, *count: int) -> Array:
    """(*count, 4) xywh of all sizes, inside the image."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (*count, 2)))
    corners = rng.uniform(0, 1, (*count, 2)) * (SIDE - sides)
    return np.concatenate([corners, sides], -1)


def discs(boxes: Array) -> torch.Tensor:
    """Boxes (N, 4) xywh -> masks (N, SIDE, SIDE) bool, of the ellipse in each."""
    x, y, width, height = (boxes[:, column, None, None] for column in range(4))
    places = np.arange(SIDE) + 0.5
    across, down = ((places[None, None] - x) / width - 0.5) ** 2, ((places[None, :, None] - y) / height - 0.5) ** 2
    return torch.from_numpy(across + down < 0.25)


def coded(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Run-length codes of masks (N, H, W)."""
    return list(coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))))


def made(images: int, detections: int, classes: int, masks: bool = False) -> tuple[dict[str, Any], list[Detections]]:
    """Ground truth of some 7 objects an image, and detections of which a part lie near them."""
    rng = np.random.default_rng(0)
    most = 15
    truth, labels = boxes(rng, images, most), rng.integers(1, classes + 1, (images, most))
    objects, crowd = rng.integers(0, most, images), rng.random((images, most)) < 0.01
    guesses, names = boxes(rng, images, detections), rng.integers(1, classes + 1, (images, detections))
    chosen = rng.integers(0, np.maximum(1, objects)[:, None], (images, detections))
    rows, near = np.arange(images)[:, None], np.arange(detections) < 3 * objects[:, None]
    guesses = np.where(near[..., None], truth[rows, chosen] * rng.normal(1, 0.08, guesses.shape), guesses)
    names = np.where(near, labels[rows, chosen], names)
    scores = rng.permuted(np.tile(np.arange(detections) / detections, (images, 1)), axis=1) * 0.9 + 0.05
    order = np.argsort(-scores, axis=1)
    guesses, names, scores = guesses[rows, order], names[rows, order], scores[rows, order]
    corners = box_convert(torch.from_numpy(guesses).float(), "xywh", "xyxy")
    found = [
        Detections(
            corners[i],
            torch.from_numpy(scores[i]).float(),
            torch.from_numpy(names[i]),
            discs(guesses[i]) if masks else None,
        )
        for i in range(images)
    ]
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        part = slice(0, int(objects[image]))
        shapes = coded(discs(truth[image, part])) if masks and objects[image] else [None] * most
        each = zip(truth[image, part].tolist(), labels[image].tolist(), crowd[image].tolist(), shapes, strict=False)
        for box, label, is_crowd, shape in each:
            note = {"id": len(annotations) + 1, "image_id": image + 1, "category_id": label, "bbox": box}
            note |= {"area": box[2] * box[3], "iscrowd": int(is_crowd)}
            annotations.append(note if shape is None else note | {"segmentation": shape})
    categories = [{"id": label, "name": str(label)} for label in range(1, classes + 1)]
    pictures = [{"id": image, "height": SIDE, "width": SIDE} for image in range(1, images + 1)]
    return {"images": pictures, "annotations": annotations, "categories": categories}, found


def ours(truth: dict[str, Any], found: list[Detections], masks: bool) -> list[float]:
    """The twelve numbers, and those of masks, fed in batches of 8."""
    metric = CocoMetric(truth, [each["name"] for each in truth["categories"]], masks=masks)
    for start in range(0, len(found), 8):
        part = found[start : start + 8]
        metric.update(tuple(range(start + 1, start + 1 + len(part))), part)
    numbers = metric.compute()
    return [numbers[kind + name] for kind in ("", *(["mask_"] if masks else [])) for name in NAMES]


def theirs(truth: dict[str, Any], found: list[Detections], masks: bool) -> list[float]:
    """The same numbers of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        results = [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for image, one in enumerate(found, start=1)
            for box, score, label in zip(
                box_convert(one.boxes.double(), "xyxy", "xywh").tolist(),
                one.scores.tolist(),
                one.labels.tolist(),
                strict=True,
            )
        ]
        numbers = _numbers(coco, results, "bbox")
        if masks:
            shapes = (shape for one in found for shape in coded(one.masks))  # type: ignore[arg-type]
            # Without boxes: pycocotools takes areas from them where there are any.
            for result, shape in zip(results, shapes, strict=True):
                result["segmentation"] = shape
                del result["bbox"]
            numbers += _numbers(coco, results, "segm")
    return numbers


def _numbers(coco: COCO, results: list[dict[str, Any]], kind: str) -> list[float]:
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def collection(detections: int, batches: int = 8, side: int = 320) -> dict[str, float]:
    """Seconds per image of a small detector on the CPU, of the collection of what it finds, and their ratio."""
    data = distill.DetectionData(
        distill.Shapes(train=2, val=4 * batches, test=0, size=side),
        batch_size=4,
        workers=0,
        min_size=side,
        max_size=side,
    )
    options = {"score_thresh": 0.0, "detections_per_img": detections}
    detector = distill.FasterRCNN(data.classes, backbone={"depth": 18}, min_size=side, max_size=side, **options).eval()
    evaluation = Evaluation(detector, data.ground_truth("val"), data.classes, [CocoMetric], torch.device("cpu"))
    detect, collect, counts = [], [], []
    for batch in data.eval_dataloader("val"):
        start = time.process_time()
        found = detector.view(batch, training=False, frozen=True).detections
        middle = time.process_time()
        evaluation.add_detections(batch.ids, found)
        detect.append((middle - start) / len(batch))
        collect.append((time.process_time() - middle) / len(batch))
        counts += [len(one.scores) for one in found]
    numbers = {"detect": statistics.median(detect[1:]), "collect": statistics.median(collect[1:])}
    return {
        "detections_per_image": statistics.fmean(counts),
        **{f"{name}_ms_per_image": round(1000 * value, 3) for name, value in numbers.items()},
        "ratio": round(numbers["collect"] / numbers["detect"], 4),
    }


def main() -> None:
    """Print both times, their ratio, how far the numbers lie apart, and what collecting adds to inference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--masks", action="store_true", help="of masks, too: some 40 MB an image in memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth, found = made(args.images, args.detections, args.classes, args.masks)
    ours(*made(10, 5, 3), masks=False)  # imports
    seconds, numbers = [], []
    for run in (ours, theirs):
        start = time.process_time()
        numbers.append(run(truth, found, args.masks))
        seconds.append(time.process_time() - start)
    apart = max(abs(a - b) for a, b in zip(*numbers, strict=True))
    answer = {
        "images": args.images,
        "detections": args.detections,
        "classes": args.classes,
        "seconds_of_processor_time": {"distill": round(seconds[0], 2), "pycocotools": round(seconds[1], 2)},
        "ratio": round(seconds[0] / seconds[1], 4),
        "AP": round(numbers[0][0], 6),
        "numbers": len(numbers[0]),
        "largest_difference": apart,
        "collection": collection(args.detections),
    }
    print(json.dumps(answer, indent=1))
    assert apart < 1e-9, "the numbers differ"


if __name__ == "__main__":
    main()
