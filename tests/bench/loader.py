"""Images per second on one core: our loader against torchvision's CocoDetection with PIL and v2 transforms.

    python tests/bench/loader.py --images DIR --annotations FILE.json [--min-size 800 --max-size 1333] [--rounds 5]

Both decode, resize without antialiasing, flip half of the images, and stack padded uint8 batches with boxes and labels, in
one process with one thread. Rounds are taken in turn; the ratio is the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.data.transforms import padded_size

BATCH = 4


def ours(args: argparse.Namespace) -> Callable[[], list[torch.Tensor]]:
    """An epoch of our training loader."""
    files = {"annotations": str(args.annotations), "images": str(args.images)}
    sizes = {"min_size": args.min_size, "max_size": args.max_size}
    data = DetectionData(
        Coco(str(args.images), train=files), BATCH, workers=0, keep_empty=True, drop_last=False, **sizes
    )
    return lambda: [batch.images for batch in data.train_dataloader()]


def theirs(args: argparse.Namespace) -> Callable[[], list[torch.Tensor]]:
    """An epoch of torchvision's, of the same images."""
    steps = [
        v2.ToImage(),
        v2.Resize(args.min_size, max_size=args.max_size, antialias=False),
        v2.RandomHorizontalFlip(0.5),
        v2.SanitizeBoundingBoxes(min_size=1),
    ]
    data: Any = CocoDetection(str(args.images), str(args.annotations), transforms=v2.Compose(steps))
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels"))
    # Empty images have no boxes, and v2 cannot sanitise what is not there.
    rows = [row for row, image in enumerate(data.ids) if data.coco.getAnnIds(image)]

    def pad(samples: list[Any]) -> torch.Tensor:
        images = [image for image, _ in samples]
        height, width = padded_size([(image.shape[-2], image.shape[-1]) for image in images], 32)
        batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
        for canvas, image in zip(batch, images, strict=True):
            canvas[:, : image.shape[-2], : image.shape[-1]] = image
        return batch

    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(data, rows), BATCH, shuffle=True, collate_fn=pad, num_workers=0
    )
    return lambda: list(loader)


def main() -> None:
    """Print images per second of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--max-size", type=int, default=1333)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{len(json.loads(args.annotations.read_text())['images'])} images, batches of {BATCH}, one process, one thread"
    )
    runs = {"ours": ours(args), "torchvision": theirs(args)}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            images = sum(len(batch) for batch in run())
            if number:  # the first round warms up
                rates[name].append(images / (time.process_time() - start))
    for name, each in rates.items():
        print(f"{name}: {statistics.median(each):.1f} images/s of processor time")
    ratios = [a / b for a, b in zip(rates["ours"], rates["torchvision"], strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
