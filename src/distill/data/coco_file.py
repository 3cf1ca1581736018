"""Reading of one annotation file in COCO's format into columns.

A valid file is decoded by C code into whole arrays. Any other file is read entry by entry, which finds out what is
wrong. The content of a large file is kept in the cache.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from distill.data.column_cache import cache_file, exclusive, load_columns, save_columns
from distill.data.packed_bytes import PackedBytes
from distill.data.records import NULL, Annotation, Records, make_record, pack_records
from distill.types import DistillError, Size

MIN_ID, MAX_ID = -(2**63), 2**63 - 1
"""Smallest and largest id that an int64 tensor can hold."""
REPEATED_IDS, TEXT_IDS = "annotation ids repeated", "ids written as text"
"""Remarks on ids."""
MIN_CACHED_SIZE = 2**20
"""Smallest annotation file, in bytes, whose content is kept in the cache."""
CACHE_VERSION = 2
"""Raise this number if the same file gives other content."""
COLUMNS = ("ids", "sizes", "ends", "boxes", "labels", "crowd", "area", "annotation_indices")
"""Columns of the records that are kept in the cache as arrays."""


@dataclass
class Content:
    """What one annotation file says."""

    classes: tuple[str, ...]
    category_ids: list[int]
    """Category ids in the order of the labels."""
    records: Records
    """The images and their annotations. `files` holds the names as the file writes them."""
    faults: list[str]
    """Messages about invalid entries, which are left out."""
    remarks: dict[str, int]
    """Counts of what was ignored or corrected without harm."""


def _make_content_records(files: PackedBytes, segmentations: PackedBytes, **columns: Any) -> Records:
    """Return records of the columns in `COLUMNS`. What the file does not say is empty."""
    images, rows = len(files), len(columns["labels"])
    return Records(
        files=files,
        annotation_files=PackedBytes.repeat(b"", images),
        file_sizes=np.full(images, -1, dtype=np.int64),
        unusable=np.zeros(images, dtype=np.bool_),
        difficult=np.zeros(rows, dtype=np.bool_),
        segmentations=segmentations,
        **columns,
    )


class ImageEntry(msgspec.Struct):
    """An image of a valid file. Other keys are ignored."""

    id: int
    file_name: str
    height: int | None = None
    width: int | None = None


class AnnotationEntry(msgspec.Struct):
    """An annotation of a valid file. The segmentation is kept as JSON."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | str | None = None
    area: float | None = None
    iscrowd: int | float | bool | None = None
    segmentation: msgspec.Raw = msgspec.Raw(NULL)


class ValidFile(msgspec.Struct):
    """The content of a file whose entries have the types that COCO's format demands."""

    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[Any]


def load_content(path: Path, split: str) -> Content:
    """Return the content of an annotation file, from the cache if the file is as it was."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return _read_content(path, split)  # raises an error that says why
    if state.st_size < MIN_CACHED_SIZE:
        return _read_content(path, split)
    cache = cache_file("coco", os.path.abspath(path))
    key = {"version": CACHE_VERSION, "path": str(path), "size": state.st_size, "modified": state.st_mtime_ns}
    with exclusive(cache):
        columns = load_columns(cache, key)
        if columns is None:
            content = _read_content(path, split)
            columns = _to_columns(content)
            if path.stat().st_mtime_ns == state.st_mtime_ns:  # else the file was changed meanwhile
                save_columns(cache, key, columns)
                columns = load_columns(cache, key) or columns  # mapped into memory, and shared with other processes
    return _from_columns(columns)


def _to_columns(content: Content) -> dict[str, NDArray[Any]]:
    columns = {name: getattr(content.records, name) for name in COLUMNS}
    for name, packed in (("names", content.records.files), ("segmentations", content.records.segmentations)):
        columns |= {f"{name}.blob": packed.blob, f"{name}.starts": packed.starts, f"{name}.ends": packed.ends}
    texts = {name: getattr(content, name) for name in ("classes", "category_ids", "faults", "remarks")}
    return columns | {"texts": np.frombuffer(json.dumps(texts).encode(), np.uint8)}


def _from_columns(columns: Mapping[str, NDArray[Any]]) -> Content:
    names, segmentations = (
        PackedBytes(*(columns[f"{name}.{part}"] for part in ("blob", "starts", "ends")))
        for name in ("names", "segmentations")
    )
    texts = json.loads(columns["texts"].tobytes())
    texts["classes"] = tuple(texts["classes"])
    return Content(
        records=_make_content_records(names, segmentations, **{name: columns[name] for name in COLUMNS}), **texts
    )


def _read_content(path: Path, split: str) -> Content:
    try:
        return _read_valid_file(path)
    except (OSError, ValueError, OverflowError, RecursionError):  # msgspec's errors are ValueErrors
        return _read_any_file(path, split)


def _read_valid_file(path: Path) -> Content:
    """Read a file without a fault, by C code and whole arrays.

    Raises:
        OSError, ValueError, OverflowError, RecursionError: the file is not valid. `_read_any_file` says why.
    """
    text = path.read_bytes()
    encoding = json.detect_encoding(text)
    if encoding in ("utf-8", "utf-8-sig"):
        text = text.removeprefix(codecs.BOM_UTF8)
        text.decode()  # msgspec skips entries that it ignores without decoding them
    else:
        text = text.decode(encoding).encode()
    file = msgspec.json.decode(text, type=ValidFile)
    del text
    remarks: Counter[str] = Counter()
    categories = np.array([entry.category_id for entry in file.annotations], dtype=np.int64)
    classes, category_ids = _parse_categories(file.categories, set(np.unique(categories).tolist()), path, remarks)
    names = [image.file_name for image in file.images]
    ids = np.array([image.id for image in file.images], dtype=np.int64)
    sizes = np.array([(image.height or 0, image.width or 0) for image in file.images], dtype=np.int64).reshape(-1, 2)
    sizes[(sizes == 0).any(axis=1)] = 0
    entries = file.annotations
    if not all(names) or "\0" in "".join(names) or not {entry.iscrowd for entry in entries} <= {0, 1, None}:
        raise ValueError
    remarks[REPEATED_IDS] = _count_repeated([entry.id for entry in entries])
    images = _find_places(ids, np.array([entry.image_id for entry in entries], dtype=np.int64))
    labels = _find_places(np.array(list(category_ids.values()), dtype=np.int64), categories) + 1
    order = np.argsort(images, kind="stable")
    boxes = np.array([entry.bbox for entry in entries], dtype=np.float64).reshape(-1, 4)[order]
    areas = [np.nan if entry.area is None else entry.area for entry in entries]
    area = np.array(areas, dtype=np.float64)[order]
    with np.errstate(over="ignore", invalid="ignore"):  # the checks report boxes that are not finite
        boxes_area = boxes[:, 2] * boxes[:, 3]
        boxes[:, 2:] += boxes[:, :2]
    records = _make_content_records(
        files=PackedBytes.pack_texts(names),
        segmentations=PackedBytes.pack([entries[place].segmentation for place in order.tolist()]),
        ids=ids,
        sizes=sizes,
        ends=np.cumsum(np.bincount(images, minlength=len(ids))),
        boxes=boxes,
        labels=labels[order],
        crowd=np.array([bool(entry.iscrowd) for entry in entries], dtype=np.bool_)[order],
        area=np.where(np.isnan(area), boxes_area, area),
        annotation_indices=order,
    )
    return Content(classes, list(category_ids.values()), records, faults=[], remarks=dict(remarks))


def _count_repeated(numbers: Sequence[Any]) -> int:
    """Return how many ids repeat an earlier one."""
    known = [number for number in numbers if isinstance(number, (int, str))]
    return len(known) - len(set(known))


def _find_places(known: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index in `known` of each number.

    Raises:
        ValueError: `known` has a number twice, or lacks a number.
    """
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    places = np.searchsorted(ordered, numbers)
    if (np.diff(ordered) == 0).any() or (places >= len(known)).any() or (ordered[places] != numbers).any():
        raise ValueError
    return order[places]


def _read_any_file(path: Path, split: str) -> Content:
    """Read a file entry by entry. Messages name the invalid entries."""
    content = _load_json(path, split)
    faults: list[str] = []
    remarks: Counter[str] = Counter()
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    remarks[REPEATED_IDS] = _count_repeated([entry.get("id") for entry in entries])
    for key, rows in (("id", content["images"]), ("id", content["categories"]), ("image_id", entries)):
        remarks[TEXT_IDS] += sum(isinstance(row, dict) and _is_digits(row.get(key)) for row in rows)
    used = {_as_integer(entry.get("category_id")) for entry in entries}
    classes, category_ids = _parse_categories(content["categories"], used, path, remarks)
    labels = {number: label for label, number in category_ids.items()}
    images = _parse_images(content["images"], path, faults)
    annotations = _parse_annotations(content["annotations"], images, labels, path, faults)
    records = pack_records(
        [make_record(number, name, size, annotations.get(number, ())) for number, (name, size) in images.items()]
    )
    return Content(classes, list(category_ids.values()), records, faults, dict(remarks))


def _load_json(path: Path, split: str) -> dict[str, list[Any]]:
    try:
        content: Any = json.loads(path.read_bytes())  # detects UTF-8, UTF-16 and UTF-32
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


def _parse_categories(
    entries: list[Any], used: Set[int | None], path: Path, remarks: Counter[str]
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Return the class names in the order of their labels, and a mapping of label to category id.

    Of categories with the same name, those that no annotation uses are dropped: some tools write a group of categories
    under the name of a class. A category that only stands for the group of all others is dropped, too, see
    `_find_placeholder`.
    """
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for place, entry in enumerate(entries):
        try:
            number, name = _read_integer(entry, "id"), _read_string(entry, "name")
            if number in names:
                raise ValueError(f"has id {number}, as '{names[number]}' has; ids must differ")
            twin = numbers.get(name)
            if twin is not None:
                if twin in used and number in used:
                    raise ValueError(
                        f"has the name '{name}', as id {twin} has, and both have annotations; give each its own name"
                    )
                remarks["unused categories of a repeated name dropped"] += 1
                if twin in used:
                    continue
                del names[twin]
        except ValueError as error:
            raise DistillError(f"{path}: categories[{place}] {error}; fix the file") from error
        names[number], numbers[name] = name, number
    placeholder = _find_placeholder(entries, names)
    if placeholder is not None and placeholder not in used:
        remarks[f"class '{names.pop(placeholder)}' dropped, which groups the others and has no box"] += 1
    if not names:
        raise DistillError(f"{path}: 'categories' is empty, so there are no classes; list them with 'id' and 'name'")
    ids = sorted(names)
    return tuple(names[number] for number in ids), dict(enumerate(ids, start=1))


def _find_placeholder(entries: list[Any], names: dict[int, str]) -> int | None:
    """Return the id of the category that all others name as their supercategory, as Roboflow writes it with id 0."""
    groups = {entry["id"]: entry.get("supercategory") for entry in entries if entry["id"] in names}
    for number, name in names.items():
        others = [group for other, group in groups.items() if other != number]
        if others and all(group == name for group in others):
            return number
    return None


def _parse_images(entries: list[Any], path: Path, faults: list[str]) -> dict[int, tuple[str, Size | None]]:
    """Return a mapping of image id to file name and stated size. Add a message to `faults` for each invalid entry."""
    images: dict[int, tuple[str, Size | None]] = {}
    ambiguous = set()
    for place, entry in enumerate(entries):
        try:
            number, name = _read_integer(entry, "id"), _read_string(entry, "file_name")
            if number in images:
                if images[number][0] == name:
                    raise ValueError(f"({name}) has id {number} again, with the same name; remove this entry")
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
    for place, entry in enumerate(entries):
        try:
            image, category = _read_integer(entry, "image_id"), _read_integer(entry, "category_id")
            if image not in images:
                raise ValueError(f"is of image {image}, which 'images' does not list (once); add it, or remove this")
            if category not in labels:
                raise ValueError(f"has category {category}, which 'categories' does not list; add it, or remove this")
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
    for side, value in zip(("height", "width"), stated, strict=True):
        if isinstance(value, str):
            raise ValueError(f"needs an integer '{side}', got {shown(value)}; fix it")
    return _read_integer(entry, "height"), _read_integer(entry, "width")


def _read_integer(entry: Any, key: str) -> int:
    value = entry.get(key) if isinstance(entry, dict) else entry
    number = _as_integer(value)
    if not isinstance(entry, dict) or number is None:
        raise ValueError(f"needs an integer '{key}', got {shown(value)}; fix it")
    return number


def _as_integer(value: Any) -> int | None:
    """Return a number of int64 from an integer, a float without fraction or a text of digits, else None."""
    is_number = type(value) is int or (isinstance(value, float) and value.is_integer()) or _is_digits(value)
    return int(value) if is_number and MIN_ID <= int(value) <= MAX_ID else None


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,18}", value) is not None


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
