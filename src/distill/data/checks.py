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

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from distill.data import rle
from distill.data.decoding import MAX_PIXELS, TRANSPOSED, ImageInfo, inspect_image
from distill.data.records import Record
from distill.types import DistillError, Size

CORRECTED = ("without area", "outside the image", "clipped", "with an empty mask")
"""Kinds of faults that are repaired and counted. A box with an empty mask is only counted."""
MAX_LISTED = 10
"""Largest number of problems that one message lists."""
THREADS = 16


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

    def __str__(self) -> str:
        parts = [f"{self.images} images", f"{self.boxes} boxes", f"{self.usable} usable"]
        counts = {"crowds": self.crowds, "difficult": self.difficult, "images without boxes": self.without_boxes}
        named = {**self.corrected, **counts, "turned by EXIF": self.turned}
        named |= {"scaled to 8 bits": self.scaled, **self.skipped}
        return f"{self.split}: {', '.join([*parts, *(f'{count} {name}' for name, count in named.items() if count)])}"


def check_records(
    records: Sequence[Record],
    split: str,
    on_error: str = "raise",
    files: bool = True,
    masks: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[Record], SplitReport]:
    """Check and repair the records of a split, in place.

    Args:
        records: the records as the source returns them.
        split: name of the split, for messages.
        on_error: `raise` raises an error that lists the problems; `skip` leaves out the affected images or annotations.
        files: whether a record's `file` is a path; False for a source that draws its images.
        masks: whether every annotation needs a segmentation. Segmentations become compressed run-length codes.
        max_pixels: largest number of pixels of an image.

    Returns:
        The usable records, and the counts of the split.

    Raises:
        DistillError: the split is empty or has no usable box, or, with `raise`, has a problem that cannot be repaired.
    """
    if not records:
        raise DistillError(f"{split}: the split is empty; check data.source.{split} and data.source.root")
    counts: Counter[str] = Counter()
    _find_duplicates(records, files)
    if files:
        _inspect_images(records, counts, max_pixels)
    for record in records:
        if not record.unusable:
            _repair_boxes(record, counts)
            if masks:
                _encode_masks(record, counts)
    problems = [fault for record in records for fault in record.faults]
    good = [record for record in records if not record.unusable]
    if problems and on_error == "raise":
        raise DistillError(_list_problems(split, problems) + "\nMend them, or leave them out with data.on_error=skip")
    if not any(len(record.labels) for record in good):
        what = "box" if good else "image"
        raise DistillError(
            f"{split}: of {len(records)} images no usable {what} is left: there is nothing to learn from or to "
            f"measure by. Check data.source.{split}" + ("\n" + _list_problems(split, problems) if problems else "")
        )
    skipped = {
        "images skipped": sum(record.unusable and bool(record.file) for record in records),
        "problems skipped": len(problems),
    }
    report = SplitReport(
        split,
        images=len(good),
        boxes=counts["boxes"],
        usable=sum(len(record.labels) for record in good),
        crowds=sum(int(record.crowd.sum()) for record in good),
        difficult=sum(int(record.difficult.sum()) for record in good),
        without_boxes=sum(not len(record.labels) for record in good),
        corrected={name: counts[name] for name in CORRECTED if counts[name]},
        turned=counts["turned by EXIF"],
        scaled=counts["scaled to 8 bits"],
        skipped={name: count for name, count in skipped.items() if count},
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
        shared = _find_shared_files(splits[later], splits[earlier])
        if shared:
            message = (
                f"{len(shared)} images of {later} are in {earlier} as well, such as {', '.join(shared[:3])}: numbers "
                f"measured on {later} are too good. Remove them from one split"
            )
            if on_overlap == "raise":
                raise DistillError(message + ", or go on with data.on_overlap=warn")
            warnings.warn(message, stacklevel=2)


def _find_duplicates(records: Sequence[Record], files: bool) -> None:
    ids: set[int] = set()
    names: set[str] = set()
    for record in records:
        if record.unusable:
            continue
        if record.id in ids:
            _mark_broken(record, f"{record.file}: image id {record.id} is used twice; ids must differ")
        elif files and record.file in names:
            _mark_broken(record, f"{record.file}: this image is listed twice; list it once, with all its boxes")
        ids.add(record.id)
        names.add(record.file)


def _inspect_images(records: Sequence[Record], counts: Counter[str], max_pixels: int) -> None:
    sound = [record for record in records if not record.unusable]
    # Pillow warns of large images and of damaged tags; both are readable. Warning filters apply to all threads, so the
    # filter is set once, outside the pool.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")
        looks = list(pool.map(partial(_inspect_file, max_pixels=max_pixels), sound))
    for record, look in zip(sound, looks, strict=True):
        fault = look if isinstance(look, str) else _set_size(record, look.size, look.orientation)
        if fault or isinstance(look, str):
            _mark_broken(record, str(fault))
        else:
            counts["turned by EXIF"] += look.orientation != 1
            counts["scaled to 8 bits"] += look.bits > 8


def _mark_broken(record: Record, fault: str) -> None:
    record.faults.append(fault)
    record.unusable = True


def _inspect_file(record: Record, max_pixels: int) -> ImageInfo | str:
    """Return the facts of an image file, or a message about a faulty file."""
    path = Path(record.file)
    try:
        if not path.is_file():
            return (
                f"{path}: no such image, but {record.annotation_file or 'a record'} names it; add it, or remove its "
                "annotations"
            )
        record.file_size = path.stat().st_size
        return inspect_image(path, max_pixels)
    except (DistillError, OSError, ValueError) as error:
        return str(error)


def _set_size(record: Record, upright: Size, turn: int) -> str | None:
    """Set the record's size to the true size. Return a message if the annotation states another size."""
    if record.size in (None, upright):
        record.size = upright
        return None
    assert record.size is not None
    (height, width), (stated_height, stated_width) = upright, record.size
    where = f"{record.annotation_file}, the annotation," if record.annotation_file else "its annotation"
    if turn in TRANSPOSED and record.size == upright[::-1]:
        return (
            f"{record.file}: its EXIF tag turns it to {width}x{height}, but {where} was made for {stated_width}x"
            f"{stated_height}; write the image again without the tag"
        )
    return (
        f"{record.file}: the image is {width}x{height}, but {where} says {stated_width}x{stated_height}; fix the size"
    )


def _repair_boxes(record: Record, counts: Counter[str]) -> None:
    """Remove invalid boxes and add a fault for each, clip the others, and remove those without area in the image."""
    assert record.size is not None
    height, width = record.size
    boxes = record.boxes
    counts["boxes"] += len(boxes)
    with np.errstate(over="ignore", invalid="ignore"):  # finite corners may have infinite sides
        sides = boxes[:, 2:] - boxes[:, :2]
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(sides).all(axis=1) & np.isfinite(record.area)
    inverted = finite & (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    for rows, reason in ((~finite, "or area is not finite"), (inverted, "ends before it begins")):
        record.faults += [_box_fault(record, index, reason) for index in np.flatnonzero(rows).tolist()]
    record.keep_rows(finite & ~inverted)
    clipped = record.boxes.clip(0, [width, height, width, height])
    moved = (clipped != record.boxes).any(axis=1)
    area = (record.boxes[:, 2:] > record.boxes[:, :2]).all(axis=1)
    inside = np.asarray((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    counts["without area"] += int((~area).sum())
    counts["outside the image"] += int((area & ~inside).sum())
    counts["clipped"] += int((moved & inside).sum())
    if moved.any():
        record.annotated_boxes, record.boxes = record.boxes, clipped
    record.keep_rows(inside)


def _box_fault(record: Record, index: int, reason: str) -> str:
    return (
        f"{_describe_place(record, index)}: the box {reason}: xyxy {record.boxes[index].tolist()}, "
        f"area {record.area[index]}; fix or remove it"
    )


def _describe_place(record: Record, index: int) -> str:
    place = index if record.annotation_indices is None else record.annotation_indices[index]
    of = f" of {Path(record.file).name}" if record.annotation_file else ""
    return f"{record.annotation_file or record.file}: annotation {place}{of}, counted from 0"


def _encode_masks(record: Record, counts: Counter[str]) -> None:
    """Encode segmentations as run-length codes. Remove annotations with an invalid one and add a fault for each."""
    assert record.size is not None
    codes: list[bytes | None] = []
    for index, shape in enumerate(record.segmentation or [None] * len(record.labels)):
        try:
            codes.append(rle.encode_segmentation(shape, record.size))
        except ValueError as error:
            codes.append(None)
            remedy = "fix or remove it, or train on boxes alone with data.masks=false"
            record.faults.append(f"{_describe_place(record, index)}: its segmentation {error}; {remedy}")
    record.segmentation = [code and rle.to_coco(code, record.size) for code in codes]
    record.keep_rows(np.array([code is not None for code in codes], dtype=bool))
    counts["with an empty mask"] += sum(not rle.mask_area(code, record.size) for code in codes if code)


def _list_problems(split: str, problems: Sequence[str]) -> str:
    lines = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED])
    more = f"\n  … and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return f"{split}: {len(problems)} problems in the data:\n{lines}{more}"


def _find_shared_files(later: Sequence[Record], earlier: Sequence[Record]) -> list[str]:
    sizes: dict[int | None, list[Path]] = {}
    for record in earlier:
        sizes.setdefault(record.file_size, []).append(Path(record.file))
    digests: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in digests:
            digests[path] = hashlib.blake2b(path.read_bytes()).digest()
        return digests[path]

    found = []
    for record in later:
        path = Path(record.file)
        rivals = sizes.get(record.file_size, ())
        if any(path == rival or digest(path) == digest(rival) for rival in rivals):
            found.append(record.file)
    return found
