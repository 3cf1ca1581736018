"""Bad data is named before the first step: what is safe to mend is mended and counted, the rest is an error or skipped.

Mended: a box over the image's edge is clipped (for training; evaluation keeps it as annotated), a box of no area is
dropped. Errors: what a source could not read, an image that is missing, unreadable, cut off, or of another size than
its annotation says, a box that is inverted or not finite, two images with one id.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from distill.data.records import Record, read_image
from distill.types import DistillError, Size

SHOWN = 10
"""Problems that one message lists."""
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""What the last bytes of a whole file hold."""
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


def check_records(
    records: Sequence[Record], split: str, on_error: str = "raise", files: bool = True
) -> tuple[list[Record], str]:
    """Check and mend the records of a split, in place.

    Args:
        records: as a source gives them.
        split: for messages.
        on_error: ``raise`` lists the problems, ``skip`` leaves out the images or annotations concerned.
        files: whether ``file`` names a file; a source that draws its images has none to look into.

    Returns:
        the usable records, and one line that counts what there is, what was mended and what was skipped.

    Raises:
        DistillError: an empty split, or under ``raise`` any problem that cannot be mended.
    """
    if not records:
        raise DistillError(f"{split}: the split is empty; check data.source.{split} and data.source.root")
    problems: list[str] = []
    counts: Counter[str] = Counter()
    if files:
        with ThreadPoolExecutor(16) as pool:
            for record, fault in zip(records, pool.map(_image_fault, records), strict=True):
                if fault:
                    record.faults.append(fault)
                    record.broken = True
    seen: set[int] = set()
    for record in records:
        if record.id in seen:
            record.faults.append(f"{record.file}: image id {record.id} is used twice; ids must differ")
            record.broken = True
        seen.add(record.id)
        if not record.broken:
            _mend(record, counts)
        problems += record.faults
    good = [record for record in records if not record.broken]
    if problems and on_error == "raise":
        raise DistillError(_listed(split, problems))
    if not good:
        raise DistillError(f"{split}: no usable image is left of {len(records)}.\n" + _listed(split, problems))
    return good, _summary(split, good, len(records) - len(good), len(problems), counts)


def check_overlap(splits: Mapping[str, Sequence[Record]], on_overlap: str = "warn") -> None:
    """Warn or raise when images stand in two splits: the same file, or a file of the same content.

    Only files of equal size are read. A student measured on images that it was trained on is measured wrongly.
    """
    for later, earlier in (("val", "train"), ("test", "train"), ("test", "val")):
        if later not in splits or earlier not in splits:
            continue
        shared = _shared(splits[later], splits[earlier])
        if shared:
            message = (
                f"{len(shared)} images of {later} are in {earlier} as well, such as {', '.join(shared[:3])}: numbers measured "
                f"on {later} are too good. Remove them from one split, or say that it is meant with data.on_overlap=warn"
            )
            if on_overlap == "raise":
                raise DistillError(message)
            warnings.warn(message, stacklevel=2)


def _image_fault(record: Record) -> str | None:
    """What is wrong with an image file, or None; fills in the record's true size."""
    if record.broken:
        return None
    path = Path(record.file)
    if not path.is_file():
        return f"{path}: no such image, but annotations name it; add it, or remove its annotations"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                size, form = (image.height, image.width), image.format
                turned = image.getexif().get(ORIENTATION) in TURNED
        if form in ENDS and not _ends_with(path, ENDS[form]):
            read_image(path)  # some whole files carry a tail; only decoding tells
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, DistillError) as error:
        return f"{path}: unreadable or cut off ({error}); replace it, or remove it from the split"
    return _settle_size(record, size, turned)


def _ends_with(path: Path, end: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return end in file.read()


def _settle_size(record: Record, size: Size, turned: bool) -> str | None:
    upright = (size[1], size[0]) if turned else size
    if record.size in (None, upright):
        record.size = upright
        return None
    if turned and record.size == size:
        return (
            f"{record.file}: its EXIF tag turns it upright to {upright[1]}x{upright[0]}, but its annotation was made for "
            f"{size[1]}x{size[0]}; write the image again without the tag"
        )
    assert record.size is not None
    height, width = record.size
    return f"{record.file}: the image is {upright[1]}x{upright[0]}, its annotation says {width}x{height}; mend the annotation"


def _mend(record: Record, counts: Counter[str]) -> None:
    """Leave out impossible boxes with a fault each, clip the rest, drop those of no area."""
    boxes = record.boxes
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(record.area)
    inverted = finite & (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    for index in np.flatnonzero(~finite):
        record.faults.append(f"{record.file}: box {index} is not finite: {boxes[index].tolist()}; mend or remove it")
    for index in np.flatnonzero(inverted):
        record.faults.append(
            f"{record.file}: box {index} ends before it begins: {boxes[index].tolist()}; mend or remove it"
        )
    record.keep(finite & ~inverted)
    assert record.size is not None
    height, width = record.size
    clipped = record.boxes.clip(0, [width, height, width, height])
    moved = (clipped != record.boxes).any(axis=1)
    if moved.any():
        record.annotated, record.boxes = record.boxes, clipped
    whole = np.asarray((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    counts["boxes"] += len(clipped)
    counts["without area"] += int((~whole).sum())
    counts["clipped"] += int((moved & whole).sum())
    record.keep(whole)


def _listed(split: str, problems: Sequence[str]) -> str:
    lines = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
    more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{split}: {len(problems)} problems in the data:\n{lines}{more}\nMend them, or leave them out with data.on_error=skip"


def _summary(split: str, records: Sequence[Record], skipped: int, problems: int, counts: Counter[str]) -> str:
    usable = sum(len(record.labels) for record in records)
    crowds = sum(int(record.crowd.sum()) for record in records)
    difficult = sum(int(record.difficult.sum()) for record in records)
    empty = sum(not len(record.labels) for record in records)
    parts = [f"{len(records)} images", f"{counts['boxes']} boxes", f"{usable} usable"]
    parts += [f"{number} {what}" for what in ("without area", "clipped") if (number := counts[what])]
    extra = ((crowds, "crowds"), (difficult, "difficult"), (empty, "images without boxes"), (skipped, "images skipped"))
    parts += [f"{number} {what}" for number, what in extra if number]
    parts += [f"{problems} problems skipped"] if problems else []
    return f"{split}: {', '.join(parts)}"


def _shared(later: Sequence[Record], earlier: Sequence[Record]) -> list[str]:
    sizes: dict[int, list[Path]] = {}
    for record in earlier:
        path = Path(record.file)
        sizes.setdefault(path.stat().st_size, []).append(path)
    digests: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in digests:
            digests[path] = hashlib.blake2b(path.read_bytes()).digest()
        return digests[path]

    found = []
    for record in later:
        path = Path(record.file)
        rivals = sizes.get(path.stat().st_size, ())
        if any(path == rival or digest(path) == digest(rival) for rival in rivals):
            found.append(record.file)
    return found
