"""Small COCO data sets, made by code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.data.coco import Coco
from distill.data.datamodule import DetectionData

SIZE = (40, 60)
"""(height, width) of the images."""


def coco_content(split: str = "train", count: int = 3) -> dict[str, list[Any]]:
    """Return a valid file: `count` images, two boxes in each, of the classes cat (id 1) and dog (id 2)."""
    height, width = SIZE
    return {
        "images": [
            {"id": n + 1, "file_name": f"{split}{n}.png", "height": height, "width": width} for n in range(count)
        ],
        "annotations": [
            {"id": n + 1, "image_id": n // 2 + 1, "category_id": n % 2 + 1, "bbox": [n + 1, 2, 20 + n, 12]}
            for n in range(2 * count)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write_coco(folder: Path, **contents: dict[str, list[Any]]) -> None:
    """Write `<split>.json` for each split, and images of different pixels under their plain names."""
    for seed, (split, content) in enumerate(contents.items()):
        (folder / f"{split}.json").write_text(json.dumps(content))
        rng = np.random.default_rng(seed)
        for name in {entry["file_name"] for entry in coco_content(split, len(content["images"]))["images"]}:
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / name)


def coco_data(
    folder: Path, *splits: str, source_options: Mapping[str, Any] | None = None, **options: Any
) -> DetectionData:
    """Return the data of these splits."""
    files: dict[str, Any] = {split: {"annotations": f"{split}.json"} for split in splits}
    source = Coco(str(folder), **files | dict(source_options or {}))
    options = {"batch_size": 2, "workers": 0, "min_size": 40, "max_size": 60, "flip": 0.0} | options
    return DetectionData(source, **options)


def boxes_by_file(data: DetectionData, split: str) -> dict[str, list[tuple[int, ...]]]:
    """Return (label, x1, y1, x2, y2) of all boxes by the name of their image file."""
    return {
        Path(record.file).name: [
            (label, *map(int, box)) for label, box in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
        ]
        for record in data.records(split)
    }
