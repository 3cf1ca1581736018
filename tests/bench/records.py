"""Processor time and memory of the set-up of a data set of COCO's size.

    python tests/bench/records.py make DIR [--images 118000] [--annotations 740000]
    python tests/bench/records.py measure DIR [--masks]

`make` writes the data set: a JSON file of about 318 MB with polygons, a small split for validation, and hard links to
a few JPEG files. `measure` prints:

- the processor seconds of the set-up, alone and as a ratio to `json.load` of the same file, for a first start and for a
  second start, which finds the cache of the first,
- the memory of the process after the set-up: RSS, PSS and USS (its own pages only), and its peak,
- the USS of a loader process, and how much of it is due to the size of the data set.

Each number is measured in a process of its own. Processor time is that of all threads. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = 80
SIZES = ((48, 64), (64, 48), (48, 48), (40, 64))
POLYGONS = 4000
VAL_IMAGES = 400
MAX_LINKS = 25_000
BATCHES = 12


def make_data(folder: Path, images: int, annotations: int) -> None:
    """Write `train.json`, `val.json` and the folder `images`."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    first_of_val = images - VAL_IMAGES
    for number in range(images):  # the file system limits the number of links to one file
        part = "val" if number >= first_of_val else number // len(SIZES) // MAX_LINKS
        copy = folder / f"{number % len(SIZES)}-{part}.jpg"
        if not copy.exists():  # bytes after the end make the files of val differ from those of train
            copy.write_bytes((folder / f"{number % len(SIZES)}.jpg").read_bytes() + b" " * (part == "val"))
        os.link(copy, folder / "images" / f"{number:012d}.jpg")
    polygons = [
        json.dumps([np.round(rng.uniform(0, 40, 2 * count), 2).tolist()]) for count in rng.poisson(17, POLYGONS) + 3
    ]
    for name, first, count, boxes in (
        ("train", 0, first_of_val, annotations),
        ("val", first_of_val, VAL_IMAGES, 2500),
    ):
        owners = rng.integers(first, first + count, boxes).tolist()
        corners = np.round(rng.uniform(1, 20, (boxes, 4)), 2).tolist()
        chosen = rng.integers(0, POLYGONS, boxes).tolist()
        labels = rng.integers(1, CATEGORIES + 1, boxes).tolist()
        with (folder / f"{name}.json").open("w") as file:
            entries = (
                {
                    "id": number,
                    "file_name": f"{number:012d}.jpg",
                    "height": SIZES[number % len(SIZES)][0],
                    "width": SIZES[number % len(SIZES)][1],
                    "license": 1,
                    "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
                    "date_captured": "2013-11-14 16:28:13",
                }
                for number in range(first, first + count)
            )
            file.write('{"images": [' + ", ".join(map(json.dumps, entries)) + '], "annotations": [')
            for number, (owner, box, polygon, label) in enumerate(zip(owners, corners, chosen, labels, strict=True)):
                file.write(", " if number else "")
                area, crowd = round(box[2] * box[3] * 0.7, 4), 0
                file.write(
                    f'{{"segmentation": {polygons[polygon]}, "area": {area}, "iscrowd": {crowd}, "image_id": {owner}, '
                    f'"bbox": {box}, "category_id": {label}, "id": {number + 1}}}'
                )
            names = [{"id": label, "name": f"class {label}"} for label in range(1, CATEGORIES + 1)]
            file.write('], "categories": ' + json.dumps(names) + "}")


def read_memory(process: int) -> dict[str, float]:
    """Return the RSS, PSS and USS of a process in MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "uss": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def measure_json(folder: Path) -> dict[str, Any]:
    """Return the processor seconds of `json.load`."""
    start = time.process_time()
    with (folder / "train.json").open() as file:
        content = json.load(file)
    seconds = time.process_time() - start
    return {"seconds": seconds, "annotations": len(content["annotations"])}


def measure_setup(folder: Path, masks: bool, limit: int | None) -> dict[str, Any]:
    """Return the processor seconds and the memory of a set-up, and the memory of a loader process."""
    from distill.data.coco import Coco
    from distill.data.datamodule import DetectionData

    before = read_memory(os.getpid())
    start = time.process_time()
    source = Coco(
        str(folder),
        {"annotations": "train.json", "images": "images"},
        {"annotations": "val.json", "images": "images"},
    )
    data = DetectionData(source, 8, workers=1, min_size=48, max_size=64, masks=masks, limit=limit, prefetch=1)
    data.setup("fit")
    loader = data.train_dataloader()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    after = read_memory(os.getpid())
    start = time.process_time()
    data.state_dict()
    digest = time.process_time() - start
    gc.collect()
    gc.freeze()  # a full collection in either process would copy the pages of all imported modules, whatever the data
    batches = iter(loader)
    for _ in range(BATCHES):
        next(batches)
    (worker,) = multiprocessing.active_children()
    return {
        "seconds": seconds,
        "digest": digest,
        "before": before,
        "after": after,
        "peak": peak,
        "worker": read_memory(worker.pid or 0),
        "boxes": data.checked["train"].usable,
        "sha256": data.state_dict()["train"]["sha256"],
    }


def call_apart(*words: str, cache: str) -> dict[str, Any]:
    """Run one measurement of this script in a new process."""
    env = os.environ | {"DISTILL_CACHE": cache}
    output = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, env=env).stdout
    return dict(json.loads(output.splitlines()[-1]))


def report(folder: Path, masks: bool) -> None:
    """Print all measurements."""
    words = [str(folder), *(["--masks"] if masks else [])]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        plain = call_apart("json", str(folder), cache=cache)
        size = (folder / "train.json").stat().st_size / 1e6
        print(f"json.load of {size:.0f} MB: {plain['seconds']:.1f} s")
        small = call_apart("setup", *words, "--limit", "200", cache=cache)
        for path in Path(cache).rglob("*.*"):
            path.unlink()
        for start in ("first", "second"):
            found = call_apart("setup", *words, cache=cache)
            before, after = found["before"], found["after"]
            print(
                f"{start} start: {found['seconds']:.1f} s, {found['seconds'] / plain['seconds']:.2f} of json.load; "
                f"digest {found['digest']:.1f} s; {found['boxes']} boxes, {found['sha256'][:12]}\n"
                f"  memory in MB, before -> after: "
                + ", ".join(f"{kind} {before[kind]:.0f} -> {after[kind]:.0f}" for kind in before)
                + f"; peak {found['peak']:.0f}\n"
                f"  loader process: USS {found['worker']['uss']:.0f} MB, {small['worker']['uss']:.0f} MB of it with "
                "200 images"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["make", "measure", "json", "setup"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=740_000)
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    if args.verb == "make":
        make_data(args.folder, args.images, args.annotations)
    elif args.verb == "measure":
        report(args.folder, args.masks)
    elif args.verb == "json":
        print(json.dumps(measure_json(args.folder)))
    else:
        print(json.dumps(measure_setup(args.folder, args.masks, args.limit)))


if __name__ == "__main__":
    main()
