"""Images per second and core: our loader against torchvision's CocoDetection with PIL and v2 transforms.

    python tests/bench/loader.py --images DIR --annotations FILE.json [--min-size 800 --max-size 1333] [--rounds 9]
        [--workers 0] [--decoder pil] [--float] [--planar]

Both loaders decode, resize without antialiasing, flip half of the images at random, and give padded batches with boxes
and labels. The script first checks that the pixels are equal. It prints the share of padding with and without batches
of one aspect. The loaders take turns, with one thread per process, and the ratio is the median over the rounds' ratios.
Time is processor time, including the workers (read from `/proc`, so workers need Linux).

By default both batches are uint8, with the channels last as decoders give them; `--planar` gives torchvision the planar
batches that `torch.stack` would make, `--float` asks both for floats in [0, 1], and `--decoder torchvision` gives
torchvision's data set its own JPEG decoder in the place of PIL's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from distill.data.coco import Coco
from distill.data.datamodule import DetectionData
from distill.diagnostics.doctor import padding_share
from distill.imaging.resizing import padded_size

BATCH = 4


class Decoded(CocoDetection):
    """CocoDetection on torchvision's own decoder."""

    def _load_image(self, id: int) -> Any:
        path = Path(self.root) / self.coco.loadImgs(id)[0]["file_name"]
        return tv_tensors.Image(decode_image(str(path), mode=ImageReadMode.RGB))


class Theirs:
    """Torchvision's data set and transforms, and the padding that everybody writes himself."""

    def __init__(self, args: argparse.Namespace) -> None:
        steps = [
            v2.ToImage(),
            v2.Resize(args.min_size, max_size=args.max_size, antialias=False),
            v2.RandomHorizontalFlip(0.5),
            *([v2.ToDtype(torch.float32, scale=True)] if args.float else []),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
        kind = CocoDetection if args.decoder == "pil" else Decoded
        data: Any = kind(str(args.images), str(args.annotations), transforms=v2.Compose(steps))
        self.dtype, self.planar = torch.float32 if args.float else torch.uint8, args.planar
        # Empty images have no boxes, and v2 cannot sanitise what is not there.
        self.rows = [row for row, image in enumerate(data.ids) if data.coco.getAnnIds(image)]
        self.files = [str(args.images / data.coco.imgs[data.ids[row]]["file_name"]) for row in self.rows]
        self.data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels"))
        self.loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.data, self.rows),
            BATCH,
            shuffle=True,
            collate_fn=self.pad,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
        )

    def pad(self, samples: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        """Zeros to the right and below."""
        images = [image for image, _ in samples]
        height, width = padded_size([(image.shape[-2], image.shape[-1]) for image in images], 32)
        if self.planar:
            batch = torch.zeros(len(images), 3, height, width, dtype=self.dtype)
        else:
            batch = torch.zeros(len(images), height, width, 3, dtype=self.dtype).permute(0, 3, 1, 2)
        for canvas, image in zip(batch, images, strict=True):
            canvas[:, : image.shape[-2], : image.shape[-1]] = image
        return batch, [target for _, target in samples]


def ours(args: argparse.Namespace, **options: Any) -> DetectionData:
    """Our data, whose training loader is measured."""
    files = {"annotations": str(args.annotations), "images": str(args.images)}
    sizes = {"min_size": args.min_size, "max_size": args.max_size}
    source = Coco(str(args.images), train=files)
    return DetectionData(source, BATCH, workers=args.workers, drop_last=False, **sizes, **options)


def check_equal(data: DetectionData, theirs: Theirs, scale: float) -> str:
    """How many images have the same pixels, mirrored or not; the rest has another size, by the rounding of one side."""
    images, equal, other = data.dataset("train", training=True), 0, 0
    place = {file: index for index, file in enumerate(images.files)}
    for row, file in zip(theirs.rows, theirs.files, strict=True):
        their = (theirs.data[row][0] * scale).round().to(torch.uint8)
        our = images[0, place[file]].image
        if our.shape != their.shape:
            other += 1
            continue
        assert torch.equal(our, their) or torch.equal(our.flip(-1), their), f"{file}: the pixels differ"
        equal += 1
    return f"{equal} of {len(theirs.rows)} images have equal pixels, {other} another size by one pixel"


def processor_time() -> float:
    """Seconds of this process and its living workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        for task in Path(f"/proc/{worker.pid}/task").glob("*/schedstat"):
            total += int(task.read_text().split()[0]) / 1e9
    return total


def run(loader: Iterable[Any], convert: bool) -> int:
    """An epoch; each batch is dropped before the next, as training does. Returns the number of images."""
    seen = 0
    for batch in loader:
        images = batch[0] if isinstance(batch, list | tuple) else batch.images
        if convert:
            images = images.float() / 255
        seen += len(images)
    return seen


def main() -> None:
    """Print images per second of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--max-size", type=int, default=1333)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decoder", choices=("pil", "torchvision"), default="pil")
    parser.add_argument("--float", action="store_true", help="both as floats in [0, 1]")
    parser.add_argument("--planar", action="store_true", help="torchvision's batches with the channels first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, theirs = ours(args), Theirs(args)
    print(check_equal(data, theirs, 255 if args.float else 1))
    loaders: dict[str, tuple[Any, bool]] = {
        "distill": (data.train_dataloader(), args.float),
        "torchvision": (theirs.loader, False),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(args.rounds + 1):
        for name, each in loaders.items():
            start = processor_time()
            images = run(*each)
            if number:  # the first round warms up, and starts the workers
                rates[name].append(images / (processor_time() - start))
    ratios = [a / b for a, b in zip(rates["distill"], rates["torchvision"], strict=True)]
    answer = {
        "batch": BATCH,
        "workers": args.workers,
        "decoder": args.decoder,
        "output": ("float32" if args.float else "uint8") + (", torchvision's planar" if args.planar else ""),
        "images_per_second_of_processor_time": {name: round(statistics.median(all), 1) for name, all in rates.items()},
        "padding": {
            "aspect_groups": round(padding_share(data), 4),
            "mixed": round(padding_share(ours(args, aspect_groups=False)), 4),
        },
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
