"""Checks that report invalid data before the first step.

Faults that are safe to repair are repaired and counted:

* A box that crosses the image's edge is clipped for training. Evaluation uses the box as annotated.
* A box without area, or without area inside the image, is removed.

Other faults are errors. With `on_error="skip"` the affected images or annotations are left out instead:

* an entry that the source cannot read,
* an image that is missing, unreadable, truncated, listed twice, or of another size than its annotation states,
* a box that is inverted or not finite,
* with masks: a segmentation that is missing or invalid.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from distill.data import rle
from distill.data.copies import find_shared_files
from distill.data.inspection import inspect_files
from distill.data.packed_bytes import PackedBytes
from distill.data.records import NULL, Record, Records, pack_records
from distill.imaging.decoding import MAX_PIXELS, TRANSPOSED
from distill.types import DistillError, Size

CORRECTED = (
    "without area",
    "outside the image",
    "clipped",
    "with an empty mask",
    "polygons of less than three corners dropped",
)
"""Kinds of faults that are repaired and counted. A box with an empty mask is only counted."""
MAX_LISTED = 10
"""Largest number of problems that one message lists."""
NEARLY_ALL, MANY = 0.95, 0.2
"""Shares of the boxes of a split from which they are taken to be in other units."""
FRACTION_TOLERANCE = 1e-3
"""Rounding of boxes that are fractions of the image."""


@dataclass(frozen=True)
class SplitReport:
    """Counts of a checked split. `str` gives one line; counts of 0 are left out, except the first three."""

    split: str
    images: int
    boxes: int
    """Number of boxes as annotated."""
    usable: int
    """Number of boxes that are left after the checks."""
    crowds: int
    difficult: int
    without_boxes: int
    """Images without boxes."""
    corrected: Mapping[str, int]
    """Number of boxes by kind of fault; the kinds are in `CORRECTED`."""
    turned: int
    """Number of images that their EXIF tag turns."""
    scaled: int
    """Number of images of more than 8 bits per channel, which are scaled to 8 bits."""
    skipped: Mapping[str, int]
    """Number of images and of problems that `on_error="skip"` left out."""
    remarks: Mapping[str, int]
    """Counts of what the source ignored or corrected without harm."""

    def __str__(self) -> str:
        parts = [f"{self.images} images", f"{self.boxes} boxes", f"{self.usable} usable"]
        counts = {"crowds": self.crowds, "difficult": self.difficult, "images without boxes": self.without_boxes}
        named = {**self.corrected, **counts, "turned by EXIF": self.turned}
        named |= {"scaled to 8 bits": self.scaled, **self.skipped, **self.remarks}
        return f"{self.split}: {', '.join([*parts, *(f'{count} {name}' for name, count in named.items() if count)])}"


def check_records(
    records: Sequence[Record],
    split: str,
    on_error: str = "raise",
    files: bool = True,
    masks: bool = False,
    max_pixels: int = MAX_PIXELS,
    need_boxes: bool = True,
) -> tuple[Records, SplitReport]:
    """Check and repair the records of a split. Records that are columns are changed in place.

    Args:
        records: the records as the source returns them.
        split: name of the split, for messages.
        on_error: `raise` raises an error that lists the problems; `skip` leaves out the affected images or annotations.
        files: whether a record's `file` is a path; False for a source that draws its images.
        masks: whether every annotation needs a segmentation. Segmentations become compressed run-length codes.
        max_pixels: largest number of pixels of an image.
        need_boxes: whether a split without a usable box is refused.

    Returns:
        The usable records, and the counts of the split.

    Raises:
        DistillError: the split is empty or has no usable box, or, with `raise`, has a problem that cannot be repaired.
    """
    if not len(records):
        raise DistillError(f"{split}: the split is empty; check data.source.{split} and data.source.root")
    columns = pack_records(records)
    counts: Counter[str] = Counter()
    _find_duplicates(columns, files)
    if files:
        _inspect_images(columns, counts, max_pixels)
    columns.keep_rows(~columns.unusable[columns.row_images()])
    _check_units(columns, split)
    _repair_boxes(columns, counts)
    if masks:
        _encode_masks(columns, counts)
    problems = [fault for _, faults in sorted(columns.faults.items()) for fault in faults]
    good = columns.select(~columns.unusable)
    if problems and on_error == "raise":
        raise DistillError(_list_problems(split, problems) + "\nMend them, or leave them out with data.on_error=skip")
    if not len(good.labels if need_boxes else good):
        what = "box" if len(good) else "image"
        raise DistillError(
            f"{split}: of {len(records)} images no usable {what} is left: there is nothing to learn from or to "
            f"measure by. Check data.source.{split}" + ("\n" + _list_problems(split, problems) if problems else "")
        )
    skipped = {
        "images skipped": int((columns.unusable & (columns.files.lengths() > 0)).sum()),
        "problems skipped": len(problems),
    }
    report = SplitReport(
        split,
        images=len(good),
        boxes=counts["boxes"],
        usable=len(good.labels),
        crowds=int(good.crowd.sum()),
        difficult=int(good.difficult.sum()),
        without_boxes=int((good.row_counts() == 0).sum()),
        corrected={name: counts[name] for name in CORRECTED if counts[name]},
        turned=counts["turned by EXIF"],
        scaled=counts["scaled to 8 bits"],
        skipped={name: count for name, count in skipped.items() if count},
        remarks={name: count for name, count in columns.remarks.items() if count},
    )
    return good, report


def check_overlap(splits: Mapping[str, Sequence[Record]], on_overlap: str = "warn") -> None:
    """Warn or raise if two splits share an image: the same file, or two files with the same content.

    The AP on images that the student was trained on is too high. Only files of equal size are read.

    Args:
        splits: split name to records. A split may be missing.
        on_overlap: `warn` or `raise`.

    Raises:
        DistillError: with `raise`, two splits share an image.
    """
    for later, earlier in (("val", "train"), ("test", "train"), ("test", "val")):
        if later not in splits or earlier not in splits:
            continue
        shared = find_shared_files(pack_records(splits[later]), pack_records(splits[earlier]))
        if shared:
            message = (
                f"{len(shared)} images of {later} are in {earlier} as well, such as {', '.join(list(shared)[:3])}: "
                f"numbers measured on {later} are too good. Remove them from one split"
            )
            if on_overlap == "raise":
                raise DistillError(message + ", or go on with data.on_overlap=warn")
            warnings.warn(message, stacklevel=2)


def _find_duplicates(records: Records, files: bool) -> None:
    """Mark images that occur twice. Their boxes may be parted between the entries, so no entry is left."""
    ids: set[int] = set()
    places: dict[str, int] = {}
    for index, (id, file) in enumerate(zip(records.ids.tolist(), records.files.texts(), strict=True)):
        if records.unusable[index]:
            continue
        if id in ids:
            remedy = "give one of the images, and its annotations, another id"
            _mark_broken(records, index, f"{file}: image id {id} is used twice; {remedy}")
        elif files and file in places:
            first = places[file]
            if _have_equal_rows(records, first, index):
                records.unusable[index] = True
                records.remarks["images listed twice with the same boxes"] += 1
            else:
                homes = dict.fromkeys(records.annotation_files.text(place) for place in (first, index))
                where = f", in {' and in '.join(homes)}" if len(homes) > 1 else ""
                fault = f"{file}: this image is listed twice{where}; list it once, with all its boxes"
                _mark_broken(records, index, fault)
                records.unusable[first] = True
        ids.add(id)
        places.setdefault(file, index)


def _have_equal_rows(records: Records, one: int, other: int) -> bool:
    columns = (records.boxes, records.labels, records.crowd, records.difficult)
    return all(np.array_equal(column[records.rows(one)], column[records.rows(other)]) for column in columns)


def _mark_broken(records: Records, index: int, fault: str) -> None:
    records.add_fault(index, fault)
    records.unusable[index] = True


def _inspect_images(records: Records, counts: Counter[str], max_pixels: int) -> None:
    """Set the true sizes of the images. Add faults for files that are missing, damaged, or of another size."""
    indices = np.flatnonzero(~records.unusable)
    facts = inspect_files([records.files.text(index) for index in indices.tolist()], max_pixels)
    records.file_sizes[indices] = facts.file_sizes
    stated = records.sizes[indices]
    is_missing = facts.file_sizes < 0
    is_other = ((stated != facts.sizes) & (stated != 0)).any(axis=1)
    for place in np.flatnonzero(is_missing | is_other).tolist():
        index = int(indices[place])
        file, annotation_file = records.files.text(index), records.annotation_files.text(index)
        if is_missing[place]:
            named = f"no such image, but {annotation_file or 'a record'} names it"
            _mark_broken(records, index, f"{Path(file)}: {named}; add it, or remove its annotations")
        elif place not in facts.faults:
            upright, other = ((int(sizes[place, 0]), int(sizes[place, 1])) for sizes in (facts.sizes, stated))
            turn = int(facts.orientations[place])
            _mark_broken(records, index, _describe_size(file, annotation_file, upright, other, turn))
    for place, fault in facts.faults.items():
        _mark_broken(records, int(indices[place]), fault)
    is_sound = ~records.unusable[indices]
    records.sizes[indices[is_sound]] = facts.sizes[is_sound]
    counts["turned by EXIF"] += int((facts.orientations[is_sound] != 1).sum())
    counts["scaled to 8 bits"] += int((facts.bits[is_sound] > 8).sum())


def _describe_size(file: str, annotation_file: str, upright: Size, stated: Size, turn: int) -> str:
    """Return the message about an image whose annotation states another size."""
    (height, width), (stated_height, stated_width) = upright, stated
    where = f"{annotation_file}, the annotation," if annotation_file else "its annotation"
    if turn in TRANSPOSED and stated == upright[::-1]:
        return (
            f"{file}: its EXIF tag turns it to {width}x{height}, but {where} was made for {stated_width}x"
            f"{stated_height}; write the image again without the tag"
        )
    return f"{file}: the image is {width}x{height}, but {where} says {stated_width}x{stated_height}; fix the size"


def _check_units(records: Records, split: str) -> None:
    """Find boxes in other units than pixels, which would pass all other checks.

    Raises:
        DistillError: nearly all boxes are fractions of the image.
    """
    boxes, sizes = records.boxes, np.tile(records.sizes[records.row_images()][:, ::-1], 2)
    file = records.annotation_files.text(0) or split
    is_fraction = ((boxes >= 0) & (boxes <= 1 + FRACTION_TOLERANCE)).all(axis=1)
    if len(boxes) and is_fraction.mean() >= NEARLY_ALL:
        raise DistillError(
            f"{file}: {int(is_fraction.sum())} of {len(boxes)} boxes of {split} lie in the first pixel, such as xyxy "
            f"{boxes[is_fraction][0].tolist()}: they are probably fractions of the image. Multiply x and width by the "
            "image's width, y and height by its height"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # the boxes may be anything
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        is_beyond = (boxes > sizes + 1).any(axis=1)
        fits_as_corners = (corners[:, 2:] > corners[:, :2]).all(axis=1) & (corners <= sizes + 1).all(axis=1)
    if len(boxes) and is_beyond.mean() >= MANY and fits_as_corners.mean() >= NEARLY_ALL:
        warnings.warn(
            f"{file}: {int(is_beyond.sum())} of {len(boxes)} boxes of {split} end outside their image, but all would "
            "fit as corners [x1, y1, x2, y2]. COCO's 'bbox' is [x, y, width, height]: convert the boxes if they "
            "hold corners",
            stacklevel=3,
        )


def _repair_boxes(records: Records, counts: Counter[str]) -> None:
    """Remove invalid boxes and add a fault for each, clip the others, and remove those without area in the image."""
    boxes, images = records.boxes, records.row_images()
    counts["boxes"] += len(boxes)
    with np.errstate(over="ignore", invalid="ignore"):  # finite corners may have infinite sides
        sides = boxes[:, 2:] - boxes[:, :2]
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(sides).all(axis=1) & np.isfinite(records.area)
    inverted = finite & (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    for rows, reason in ((~finite, "or area is not finite"), (inverted, "ends before it begins")):
        for row in np.flatnonzero(rows).tolist():
            records.add_fault(int(images[row]), _box_fault(records, row, int(images[row]), reason))
    records.keep_rows(finite & ~inverted)
    boxes, images = records.boxes, records.row_images()
    corners = np.tile(records.sizes[images][:, ::-1], 2)
    clipped = boxes.clip(0, corners)
    moved = (clipped != boxes).any(axis=1)
    area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    inside = np.asarray((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    counts["without area"] += int((~area).sum())
    counts["outside the image"] += int((area & ~inside).sum())
    counts["clipped"] += int((moved & inside).sum())
    if moved.any():
        records.annotated_boxes = boxes
        is_changed = np.bincount(images[moved], minlength=len(records)) > 0
        records.boxes = np.where(is_changed[images][:, None], clipped, boxes)
    records.keep_rows(inside)


def _box_fault(records: Records, row: int, image: int, reason: str) -> str:
    return (
        f"{_describe_place(records, row, image)}: the box {reason}: xyxy {records.boxes[row].tolist()}, "
        f"area {records.area[row]}; fix or remove it"
    )


def _describe_place(records: Records, row: int, image: int) -> str:
    file, annotation_file = records.files.text(image), records.annotation_files.text(image)
    of = f" of {Path(file).name}" if annotation_file else ""
    return f"{annotation_file or file}: annotation {records.annotation_indices[row]}{of}, counted from 0"


def _encode_masks(records: Records, counts: Counter[str]) -> None:
    """Encode segmentations as run-length codes. Remove annotations with an invalid one and add a fault for each."""
    entries: list[bytes] = []
    images, sizes = records.row_images().tolist(), records.sizes.tolist()
    is_valid = np.ones(len(images), dtype=np.bool_)
    for row, image in enumerate(images):
        size = (sizes[image][0], sizes[image][1])
        segmentation = records.segmentation(row)
        try:
            code = rle.encode_segmentation(segmentation, size)
        except ValueError as error:
            is_valid[row] = False
            remedy = "fix or remove it, or train on boxes alone with data.masks=false"
            place = _describe_place(records, row, image)
            records.add_fault(image, f"{place}: its segmentation {error}; {remedy}")
            entries.append(NULL)
        else:
            counts["with an empty mask"] += not rle.mask_area(code, size)
            counts["polygons of less than three corners dropped"] += rle.count_degenerate(segmentation)
            entries.append(msgspec.json.encode(rle.to_coco(code, size)))
    records.segmentations = PackedBytes.pack(entries)
    records.keep_rows(is_valid)


def _list_problems(split: str, problems: Sequence[str]) -> str:
    lines = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED])
    more = f"\n  … and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return f"{split}: {len(problems)} problems in the data:\n{lines}{more}"
