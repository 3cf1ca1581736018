"""AP of a COCO-sized evaluation, ours against pycocotools' own, on synthetic detections: seconds, their ratio, the numbers.

    python tests/bench/evaluation.py [--images 5000] [--detections 100] [--classes 80]

Ours is all from the first `update` to the numbers. Theirs is all from tensors in memory: the list of COCO results,
`loadRes`, `evaluate`, `accumulate` and `summarize`. Both include the reading of the ground truth, given as a dict.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from distill.metrics.coco import CocoMetric
from distill.types import Detections

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SIDE = 640


def boxes(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(count, 4) xywh of all sizes, inside the image."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (SIDE - sides)
    return np.concatenate([corners, sides], 1)


def made(images: int, detections: int, classes: int) -> tuple[dict[str, Any], list[Detections]]:
    """Ground truth of some 7 objects an image, and detections of which a part lie near them."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    found = []
    for image in range(1, images + 1):
        truth, labels = boxes(rng, rng.integers(0, 15)), rng.integers(1, classes + 1, 15)
        for box, label in zip(truth, labels, strict=False):
            note = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "bbox": box.tolist()}
            annotations.append(note | {"area": float(box[2] * box[3]), "iscrowd": int(rng.random() < 0.01)})
        guesses, names = boxes(rng, detections), rng.integers(1, classes + 1, detections)
        near = min(3 * len(truth), detections)
        chosen = rng.integers(0, max(1, len(truth)), near)
        if near:
            guesses[:near] = truth[chosen] * rng.normal(1, 0.08, (near, 4))
            names[:near] = labels[chosen]
        scores = torch.from_numpy(rng.permutation(detections) / detections * 0.9 + 0.05 * rng.random()).float()
        order = scores.argsort(descending=True)
        corners = box_convert(torch.from_numpy(guesses).float(), "xywh", "xyxy")
        found.append(Detections(corners[order], scores[order], torch.from_numpy(names)[order]))
    categories = [{"id": label, "name": str(label)} for label in range(1, classes + 1)]
    pictures = [{"id": image, "height": SIDE, "width": SIDE} for image in range(1, images + 1)]
    return {"images": pictures, "annotations": annotations, "categories": categories}, found


def ours(truth: dict[str, Any], found: list[Detections]) -> list[float]:
    """The twelve numbers, fed in batches of 8."""
    metric = CocoMetric(truth, [each["name"] for each in truth["categories"]])
    for start in range(0, len(found), 8):
        part = found[start : start + 8]
        metric.update(tuple(range(start + 1, start + 1 + len(part))), part)
    numbers = metric.compute()
    return [numbers[name] for name in NAMES]


def theirs(truth: dict[str, Any], found: list[Detections]) -> list[float]:
    """The twelve numbers of pycocotools."""
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
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def main() -> None:
    """Print both times, their ratio, and how far the numbers lie apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    truth, found = made(args.images, args.detections, args.classes)
    ours(*made(10, 5, 3))  # imports
    seconds, numbers = [], []
    for run in (ours, theirs):
        start = time.process_time()
        numbers.append(run(truth, found))
        seconds.append(time.process_time() - start)
    apart = max(abs(a - b) for a, b in zip(*numbers, strict=True))
    print(f"{args.images} images x {args.detections} detections, {args.classes} classes, processor time of one process")
    print(f"ours {seconds[0]:.2f} s, pycocotools {seconds[1]:.2f} s: {seconds[0] / seconds[1]:.3f} of its time")
    print(f"AP {numbers[0][0]:.6f}; the twelve numbers differ by {apart:.1e} at most")
    assert apart < 1e-9, "the numbers differ"


if __name__ == "__main__":
    main()
