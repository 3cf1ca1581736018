"""One image and its annotations, as every source gives them: in original pixels, before any resize."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from distill.types import DistillError, Size

EXIF_ORIENTATION = 0x0112
"""EXIF's tag."""
MAX_PIXELS = 150_000_000
"""Of an image that is decoded; it takes 450 MB. Below the limit at which Pillow refuses by itself."""
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's markers of a frame header."""
BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xFF})
"""What follows 0xFF in a JPEG without a length: no marker, markers without a segment, fill."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows more, of which EPS is a program."""


class Annotation(NamedTuple):
    """One annotation as its source read it."""

    box: Sequence[float]
    """xyxy in pixels, right and bottom edge exclusive."""
    label: int
    area: float
    crowd: bool
    difficult: bool
    entry: int
    segmentation: Any


@dataclass
class Record:
    """An image as annotated. Row i of every array is annotation i, crowds and difficult objects included."""

    id: int
    file: str
    size: Size | None
    """(height, width) that the annotation states; the true one once checked."""
    boxes: NDArray[np.float64]
    """(N, 4) xyxy in pixels, right and bottom edge exclusive; clipped to the image once checked."""
    labels: NDArray[np.int64]
    """(N,) from 1 to K."""
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float64]
    """(N,) as annotated: of the segmentation in COCO, of the box elsewhere."""
    segmentation: list[Any] | None = None
    """Per annotation polygons or RLE as they stand in the file; compressed RLE once checked for masks; or None."""
    annotated: NDArray[np.float64] | None = None
    """The boxes before they were clipped to the image, where that changed any: evaluation measures by these."""
    where: str = ""
    """The file that holds the annotations."""
    entries: NDArray[np.int64] | None = None
    """(N,) places of the annotations in that file, from 0."""
    faults: list[str] = field(default_factory=list)
    """What its source found wrong with it: annotations named here were left out."""
    broken: bool = False
    """Whether the image cannot be used at all."""
    file_size: int | None = None
    """Bytes of the image's file, once checked."""

    def keep_rows(self, rows: NDArray[np.bool_]) -> None:
        """Drop the annotations that are not in ``rows`` (N,)."""
        if rows.all():
            return
        self.boxes, self.labels, self.area = self.boxes[rows], self.labels[rows], self.area[rows]
        self.crowd, self.difficult = self.crowd[rows], self.difficult[rows]
        if self.annotated is not None:
            self.annotated = self.annotated[rows]
        if self.entries is not None:
            self.entries = self.entries[rows]
        if self.segmentation is not None:
            self.segmentation = [each for each, kept in zip(self.segmentation, rows, strict=True) if kept]


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Without the garbage collector, which walks the millions of objects of a large data set again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def make_record(id: int, file: str, size: Size | None, notes: Sequence[Annotation] = (), where: str = "") -> Record:
    """A record from its annotations."""
    boxes, labels, area, crowd, difficult, entries, shapes = zip(*notes, strict=True) if notes else ((),) * 7
    return Record(
        id=id,
        file=file,
        size=size,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array(crowd, dtype=np.bool_),
        difficult=np.array(difficult, dtype=np.bool_),
        area=np.array(area, dtype=np.float64),
        segmentation=None if all(shape is None for shape in shapes) else list(shapes),
        where=where,
        entries=np.array(entries, dtype=np.int64),
    )


def make_broken_record(where: str, faults: Sequence[str], file: str = "") -> Record:
    """An image that cannot be used, or, without a file, what is wrong with an annotation file in other places."""
    found = make_record(-1, file, None, where=where)
    found.faults, found.broken = list(faults), True
    return found


def open_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image of which the header is read, and no pixel yet.

    Raises:
        ValueError: it says that there are more pixels than ``max_pixels``.
        OSError: it is missing, or none of FORMATS.
    """
    if max_pixels > 2 * (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # who asks for more than Pillow's own limit gets it
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"{image.width}x{image.height} are more pixels than data.max_pixels={max_pixels}")
    return image


def read_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image into (3, H, W) uint8 RGB, turned upright by its EXIF tag, whatever its extension says.

    Alpha is dropped, 16-bit greys keep their upper byte, of an animation the first picture counts. Pixels lie in memory
    as (H, W, 3), whichever library decodes.

    Raises:
        DistillError: missing, unreadable, truncated, or larger than ``max_pixels`` by its header; names the file.
    """
    try:
        decoded = _decode_jpeg(str(file), max_pixels)
        if decoded is not None:
            return decoded
        with open_image(file, max_pixels) as image:
            upright = image if exif_orientation(image) == 1 else ImageOps.exif_transpose(image)
            pixels = _to_rgb(upright)
    except Exception as error:  # Pillow's decoders raise anything at damaged bytes
        raise DistillError(f"{file}: cannot be read as an image ({error}); replace it, or leave it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(file: str, max_pixels: int) -> Tensor | None:
    """The image of a JPEG. None of another file, a larger one, or one that torchvision cannot decode.

    Of those Pillow knows some, or says what is wrong. Pillow would read every header first, at a tenth of the decoder's time.
    """
    with suppress(RuntimeError):
        content = read_file(file)
        size = jpeg_size(memoryview(content.numpy()))
        if size is not None and size[0] * size[1] <= max_pixels:
            decoded: Tensor = decode_jpeg(content, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return decoded
    return None


def jpeg_size(content: bytes | memoryview) -> Size | None:
    """(height, width) as the frame header of a JPEG says, which decoders go by; None where it does not come in order.

    Source: ITU-T T.81, B.1.1 and B.2.2: segments of a marker, a length that counts itself, and content. What decoders pass
    over before a marker is no order: read on there, a segment's content could be taken for another, smaller frame header.
    """
    place = 2 if content[:2] == b"\xff\xd8" else len(content)
    while place + 9 <= len(content) and content[place] == 0xFF and content[place + 1] not in BARE_MARKERS:
        length, height, width = (int.from_bytes(content[place + at : place + at + 2], "big") for at in (2, 5, 7))
        if content[place + 1] in FRAME_MARKERS:
            return height, width
        place += 2 + length
    return None


def exif_orientation(image: Image.Image) -> int:
    """EXIF's orientation of an opened image, 1 where there is none; XMP's does not count, as torchvision ignores it."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        return int(exif.get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged tag is no tag
        return 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise ValueError("its pixels are floats; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would cut all above 255
        grey = (np.array(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


@paused_garbage_collection()
def coco_ground_truth(records: Sequence[Record], classes: Sequence[str]) -> dict[str, Any]:
    """Records in COCO's JSON form, in original pixels; ``category_id`` is the label, VOC's mark is ``difficult``."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for each in records:
        height, width = each.size or (0, 0)
        images.append({"id": each.id, "file_name": each.file, "height": height, "width": width})
        boxes = each.boxes if each.annotated is None else each.annotated
        shapes = each.segmentation or [None] * len(each.labels)
        rows = zip(
            boxes.tolist(),
            each.labels.tolist(),
            each.crowd,
            each.difficult,
            each.area.tolist(),
            shapes,
            strict=True,
        )
        for (x1, y1, x2, y2), label, crowd, difficult, area, shape in rows:
            note = {
                "id": len(annotations) + 1,
                "image_id": each.id,
                "category_id": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area,
                "iscrowd": int(crowd),
                "difficult": int(difficult),
            }
            annotations.append(note if shape is None else note | {"segmentation": shape})
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
