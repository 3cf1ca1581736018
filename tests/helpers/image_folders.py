"""Tiny data sets on disk, in the layouts that the recipes expect, made of drawn shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from distill.data.records import Record, coco_ground_truth
from distill.data.shapes import Shapes


def drawn(split: str, count: int) -> tuple[tuple[str, ...], list[tuple[Record, Image.Image]]]:
    source = Shapes(**{"train": 0, "val": 0, "test": 0, "size": 64, split: count})
    classes, records = source.read_split(split)
    pictures = [Image.fromarray(source.load_image(each.file).permute(1, 2, 0).numpy()) for each in records]
    return classes, list(zip(records, pictures, strict=True))


def write_coco(root: Path) -> None:
    """COCO's layout: train2017, val2017 and their instances files."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 4)):
        folder = root / f"{split}2017"
        folder.mkdir()
        classes, images = drawn(split, count)
        truth: dict[str, Any] = coco_ground_truth([record for record, _ in images], classes)
        for entry, (_, picture) in zip(truth["images"], images, strict=True):
            entry["file_name"] = f"{entry['id']:012d}.png"
            picture.save(folder / entry["file_name"])
        for each in truth["annotations"]:
            x, y, w, h = each["bbox"]
            each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(truth))


def write_voc(root: Path, lists: dict[str, tuple[str, int]]) -> None:
    """VOC's layout; ``lists``: name of the list -> (split that is drawn, number of images)."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, (split, count) in lists.items():
        classes, images = drawn(split, count)
        stems = [f"{root.name}_{split}_{record.id:06d}" for record, _ in images]
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems))
        for stem, (record, picture) in zip(stems, images, strict=True):
            picture.save(root / "JPEGImages" / f"{stem}.jpg")
            (root / "Annotations" / f"{stem}.xml").write_text(_xml(record, classes))


def write_yolo(root: Path) -> None:
    """Roboflow's YOLO layout: train and valid with images and labels each, and a data.yaml."""
    for split, folder, count in (("train", "train", 8), ("val", "valid", 4)):
        classes, images = drawn(split, count)
        for part in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for record, picture in images:
            picture.save(root / folder / "images" / f"{record.id}.jpg")
            lines = [
                f"{label - 1} {(x1 + x2) / 128} {(y1 + y2) / 128} {(x2 - x1) / 64} {(y2 - y1) / 64}"
                for (x1, y1, x2, y2), label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
            ]
            (root / folder / "labels" / f"{record.id}.txt").write_text("\n".join(lines))
    names = "".join(f"- {name}\n" for name in classes)
    (root / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnc: {len(classes)}\nnames:\n{names}"
    )


def _xml(record: Record, classes: tuple[str, ...]) -> str:
    things = "".join(
        f"<object><name>{classes[label - 1]}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for (x1, y1, x2, y2), label in zip(record.boxes.astype(int).tolist(), record.labels.tolist(), strict=True)
    )
    size = "<size><width>64</width><height>64</height><depth>3</depth></size>"
    return f"<annotation>{size}{things}</annotation>"
