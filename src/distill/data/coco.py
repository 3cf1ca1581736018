"""The source of data sets in COCO's format: one JSON file of images, annotations and categories for each split."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from distill.data.records import Annotation, Record, make_record, make_unusable_record, paused_garbage_collection
from distill.types import DistillError, Size

SplitFiles = Mapping[str, str | None]
"""The entries `annotations` (JSON file) and `images` (folder) of a split."""
MIN_ID, MAX_ID = -(2**63), 2**63 - 1
"""Smallest and largest id that an int64 tensor can hold."""


class Coco:
    """The source `data=coco` reads any file in the format of COCO's `instances_*.json`.

    The categories are the classes, in ascending order of their ids. The ids may start at 0 and may have gaps. The
    attribute `category_ids` maps each label to its category id in the last file read. Crowds are no training targets.
    The records keep them because evaluation ignores detections on crowds.

    If `images` is None, the image folder is the first of these that contains the first image of the JSON file: the
    folder of the JSON file, `root`, `root/images`, and the folder in `root` that is named like the last part of the
    JSON file's name (`train2017` for `instances_train2017.json`). If none of them contains it, the folder of the JSON
    file is used. A `file_name` must not lead out of both the image folder and `root`.

    Args:
        root: folder that all paths of the splits are relative to.
        train, val, test: a mapping with `annotations` (the JSON file) and `images` (the folder of the image files, or
            None). None if the data set has no such split.

    Raises:
        DistillError: a split is not a mapping of these two keys.
    """

    masks = True

    def __init__(
        self, root: str, train: SplitFiles | None = None, val: SplitFiles | None = None, test: SplitFiles | None = None
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = {"train": train, "val": val, "test": test}
        self.category_ids: dict[int, int] = {}
        for split, files in self.files.items():
            if files is not None and not (isinstance(files, Mapping) and set(files) <= {"annotations", "images"}):
                raise DistillError(
                    f"data.source.{split}: expected 'annotations' and 'images', got {shown(files)}; "
                    f"set data.source.{split}.annotations to the JSON"
                )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have an annotation file."""
        return tuple(split for split, files in self.files.items() if files and files.get("annotations"))

    @paused_garbage_collection()
    def read_split(self, split: str) -> tuple[tuple[str, ...], list[Record]]:
        """Read the class names and records of a split.

        Invalid images and annotations are left out. An unusable record lists them as faults.

        Raises:
            DistillError: the split is not configured, its file is missing or is not JSON, one of the lists `images`,
                `annotations` and `categories` is missing, or a category is invalid.
        """
        files = self.files.get(split)
        if not files or not files.get("annotations"):
            raise DistillError(f"data=coco has no split '{split}': set data.source.{split}.annotations to its JSON")
        path = self.root / str(files["annotations"])
        content = _load_json(path, split)
        classes, self.category_ids = _parse_categories(content["categories"], path)
        labels = {number: label for label, number in self.category_ids.items()}
        faults: list[str] = []
        images = _parse_images(content["images"], path, faults)
        folder = self.root / str(files["images"]) if files.get("images") else self._folder(path, images)
        notes = _parse_annotations(content["annotations"], images, labels, path, faults)
        records = [
            make_record(number, str(folder / name), size, notes.get(number, ()), str(path))
            if self._holds(folder / name, folder)
            else make_unusable_record(str(path), [f"{path}: image {number}: {_outside_message(name, folder)}"], name)
            for number, (name, size) in images.items()
        ]
        return classes, records + ([make_unusable_record(str(path), faults)] if faults else [])

    def _folder(self, path: Path, images: Mapping[int, tuple[str, Size | None]]) -> Path:
        usual = (path.parent, self.root, self.root / "images", self.root / path.stem.rpartition("_")[2])
        first = next((name for name, _ in images.values()), "")
        return next((folder for folder in usual if os.path.isfile(folder / first)), path.parent)

    def _holds(self, file: Path, folder: Path) -> bool:
        """Whether the path of a file lies in the image folder or in `root`.

        Symbolic links are not resolved: the owner of the folder may link to files elsewhere.
        """
        place = Path(os.path.abspath(file))
        return any(place.is_relative_to(os.path.abspath(home)) for home in (folder, self.root))


def _outside_message(name: str, folder: Path) -> str:
    return f"'file_name' {shown(name)} leads out of {folder} and of data.source.root; name a file inside"


def _load_json(path: Path, split: str) -> dict[str, list[Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content: Any = json.load(file)
    except FileNotFoundError:
        raise DistillError(
            f"{path}: no such annotation file; set data.source.root and data.source.{split}.annotations"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DistillError(f"{path}: cannot be read as JSON ({error}); write or download it again") from error
    if isinstance(content, dict) and "images" in content and "annotations" not in content:
        raise DistillError(
            f"{path}: has no 'annotations' (COCO's test files do not): there is nothing to learn from or to measure "
            f"by. Use an instances_*.json, or data.source.{split}=null"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DistillError(f"{path}: expected COCO's form, an object with a list '{key}'; write it in this form")
    return dict(content)


def _parse_categories(entries: list[Any], path: Path) -> tuple[tuple[str, ...], dict[int, int]]:
    """Return the class names in the order of their labels, and a mapping of label to category id."""
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        try:
            number, name = _read_integer(entry, "id"), _read_string(entry, "name")
            if number in names or name in names.values():
                raise ValueError(f"has id {number} or name '{name}' of another; both must differ")
        except ValueError as error:
            raise DistillError(f"{path}: categories[{place}] {error}; fix the file") from error
        names[number] = name
    if not names:
        raise DistillError(f"{path}: 'categories' is empty, so there are no classes; list them with 'id' and 'name'")
    ids = sorted(names)
    return tuple(names[number] for number in ids), dict(enumerate(ids, start=1))


def _parse_images(entries: list[Any], path: Path, faults: list[str]) -> dict[int, tuple[str, Size | None]]:
    """Return a mapping of image id to file name and stated size. Add a message to `faults` for each invalid entry."""
    images: dict[int, tuple[str, Size | None]] = {}
    ambiguous = set()
    for place, entry in enumerate(entries):
        try:
            number, name = _read_integer(entry, "id"), _read_string(entry, "file_name")
            if number in images:
                if images[number][0] != name:
                    ambiguous.add(number)
                raise ValueError(f"({name}) has id {number} again, as {images[number][0]} has; give it its own")
            images[number] = name, _stated_size(entry)
        except ValueError as error:
            faults.append(f"{path}: images[{place}] {error}")
    for number in ambiguous:  # the annotations of two files with one id cannot be told apart
        del images[number]
    return images


def _parse_annotations(
    entries: list[Any], images: Mapping[int, Any], labels: Mapping[int, int], path: Path, faults: list[str]
) -> dict[int, list[Annotation]]:
    """Return a mapping of image id to annotations. Add a message to `faults` for each invalid entry."""
    notes: dict[int, list[Annotation]] = defaultdict(list)
    seen: set[int] = set()
    for place, entry in enumerate(entries):
        try:
            image, category = _read_integer(entry, "image_id"), _read_integer(entry, "category_id")
            if image not in images:
                raise ValueError(f"is of image {image}, which 'images' does not list (once); add it, or remove this")
            if category not in labels:
                raise ValueError(f"has category {category}, which 'categories' does not list; add it, or remove this")
            if entry.get("id") is not None:
                number = _read_integer(entry, "id")
                if number in seen:
                    raise ValueError(f"has id {number}, as another has; give it its own")
                seen.add(number)
            notes[image].append(_parse_annotation(entry, labels[category], place))
        except ValueError as error:
            faults.append(f"{path}: annotations[{place}] {error}")
    return notes


def _parse_annotation(entry: Mapping[str, Any], label: int, place: int) -> Annotation:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"needs 'bbox' [x, y, width, height], got {shown(box)}; write it, or remove this")
    x, y, width, height = (_to_float(value, "bbox") for value in box)
    area, crowd = entry.get("area"), entry.get("iscrowd")
    if crowd not in (0, 1, None):
        raise ValueError(f"needs 'iscrowd' 0 or 1, got {shown(crowd)}; fix it")
    area = width * height if area is None else _to_float(area, "area")
    return Annotation((x, y, x + width, y + height), label, area, bool(crowd), False, place, entry.get("segmentation"))


def _stated_size(entry: Mapping[str, Any]) -> Size | None:
    stated = [entry.get(side) for side in ("height", "width")]
    if None in stated or 0 in stated:
        return None
    return _read_integer(entry, "height"), _read_integer(entry, "width")


def _read_integer(entry: Any, key: str) -> int:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is int and MIN_ID <= value <= MAX_ID:
        return value
    if isinstance(value, float) and value.is_integer() and MIN_ID <= value <= MAX_ID:
        return int(value)
    raise ValueError(f"needs an integer '{key}', got {shown(value if isinstance(entry, dict) else entry)}; fix it")


def _read_string(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"needs a text '{key}', got {shown(value)}; fix it")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"has a '{key}' that is no text, {shown(value)}; fix it")
    return value


def _to_float(value: Any, key: str) -> float:
    if type(value) is float:
        return value
    if type(value) is not int:
        raise ValueError(f"needs numbers in '{key}', got {shown(value)}; fix it, or remove this")
    try:
        return float(value)
    except OverflowError:
        return float("inf")
