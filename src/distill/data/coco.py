"""COCO's format: one JSON of images, annotations and categories per split."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.data.records import Record, record
from distill.types import DistillError, Size


class Coco:
    """The source ``data=coco``: any file in the format of COCO's ``instances_*.json``.

    Args:
        root: folder that all paths below are relative to.
        train, val, test: ``annotations``, the JSON, and ``images``, the folder of the files that it names (None: the
            folder of the JSON itself); None for a split that there is not.

    Categories are the classes, in ascending order of their ids, which may start at 0 and have gaps. Crowds are kept for
    evaluation, which ignores them, and are no training targets.
    """

    def __init__(
        self,
        root: str,
        train: Mapping[str, str | None] | None = None,
        val: Mapping[str, str | None] | None = None,
        test: Mapping[str, str | None] | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = {"train": train, "val": val, "test": test}
        self.category_ids: dict[int, int] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are configured."""
        return tuple(split for split, files in self.files.items() if files and files.get("annotations"))

    def read(self, split: str) -> tuple[tuple[str, ...], list[Record]]:
        """Class names and records of a split; what is wrong with single entries is noted in their records' faults.

        Raises:
            DistillError: the file is missing, no JSON, or lacks what evaluation and training need.
        """
        if split not in self.splits:
            raise DistillError(f"data=coco has no split '{split}': set data.source.{split}.annotations to its JSON")
        files = self.files[split]
        assert files is not None
        path = self.root / str(files["annotations"])
        content = _load(path)
        folder = self.root / str(files["images"]) if files.get("images") else path.parent
        classes, labels = self._categories(content, path)
        records = _images(content, folder, path)
        if "annotations" not in content:
            raise DistillError(
                f"{path}: has no 'annotations' (COCO's test files do not): there is nothing to learn from or to measure by. "
                "Use an instances_*.json, or data.source.test=null"
            )
        _annotate(records, content["annotations"], labels, path)
        return classes, list(records.values())

    def _categories(self, content: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], dict[int, int]]:
        try:
            pairs = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
        except (KeyError, TypeError, ValueError) as error:
            raise DistillError(
                f"{path}: expected 'categories' with 'id' and 'name' each, failed at {error!r}"
            ) from error
        ids, names = [number for number, _ in pairs], [name for _, name in pairs]
        if len(set(ids)) < len(ids) or len(set(names)) < len(names) or not ids:
            raise DistillError(f"{path}: expected categories with different ids and names, got {pairs[:20]}")
        self.category_ids = dict(enumerate(ids, start=1))
        return tuple(names), {number: label for label, number in self.category_ids.items()}


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DistillError(
            f"{path}: no such annotation file; set data.source.root and data.source.*.annotations"
        ) from None
    except (OSError, ValueError) as error:
        raise DistillError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DistillError(f"{path}: expected COCO's form, an object with 'images', 'annotations' and 'categories'")
    return content


def _images(content: Mapping[str, Any], folder: Path, path: Path) -> dict[int, Record]:
    records: dict[int, Record] = {}
    for place, entry in enumerate(content["images"]):
        try:
            number, name = int(entry["id"]), str(entry["file_name"])
        except (KeyError, TypeError, ValueError) as error:
            raise DistillError(f"{path}: images[{place}] needs 'id' and 'file_name', failed at {error!r}") from error
        if number in records:
            records[number].faults.append(f"{path}: images[{place}] ({name}) has id {number} again; ids must differ")
            continue
        records[number] = record(number, str(folder / name), _size(entry), [])
    return records


def _size(entry: Mapping[str, Any]) -> Size | None:
    height, width = entry.get("height"), entry.get("width")
    return (int(height), int(width)) if height and width else None


def _annotate(records: dict[int, Record], entries: Any, labels: Mapping[int, int], path: Path) -> None:
    if not isinstance(entries, list):
        raise DistillError(f"{path}: expected a list of 'annotations', got {type(entries).__name__}")
    rows: dict[int, list[tuple[list[float], int, bool, bool, float]]] = defaultdict(list)
    shapes: dict[int, list[Any]] = defaultdict(list)
    seen: set[Any] = set()
    for place, entry in enumerate(entries):
        try:
            image, category = int(entry["image_id"]), int(entry["category_id"])
            x, y, width, height = map(float, entry["bbox"])
            area = float(entry.get("area", width * height))
        except (KeyError, TypeError, ValueError) as error:
            raise DistillError(
                f"{path}: annotations[{place}] needs 'image_id', 'category_id' and 'bbox' [x, y, w, h], failed at {error!r}"
            ) from error
        number = entry.get("id", ("no id", place))
        fault = None
        if image not in records:
            records[image] = record(image, f"(image {image} of {path})", None, [])
            records[image].broken = True
        if records[image].broken:
            fault = f"names image {image}, which 'images' does not list"
        elif category not in labels:
            fault = f"has category {category}, which 'categories' does not list"
        elif number in seen:
            fault = f"has id {number} again; ids must differ"
        seen.add(number)
        if fault:
            records[image].faults.append(f"{path}: annotations[{place}] (id {number}) {fault}")
            continue
        rows[image].append(
            ([x, y, x + width, y + height], labels[category], bool(entry.get("iscrowd", 0)), False, area)
        )
        shapes[image].append(entry.get("segmentation"))
    for image, notes in rows.items():
        old = records[image]
        records[image] = record(old.id, old.file, old.size, notes)
        records[image].faults = old.faults
        records[image].segmentation = shapes[image]
