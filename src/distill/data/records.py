"""One image and its annotations, in pixels of the original image, and the decoding of image files."""

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
"""EXIF's tag of the orientation."""
MAX_PIXELS = 150_000_000
"""Most pixels of an image that is decoded: 450 MB of memory. Above its own, higher limit Pillow raises by itself."""
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the JPEG markers that begin a frame header."""
BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xFF})
"""Bytes after 0xFF in a JPEG that no length follows: escaped data, markers without a segment, and fill bytes."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded. Pillow knows more, among them EPS, which is a program."""


class Annotation(NamedTuple):
    """One annotated object, as its source read it."""

    box: Sequence[float]
    """xyxy in pixels, right and bottom edge exclusive."""
    label: int
    area: float
    crowd: bool
    difficult: bool
    position: int
    """Place of the annotation in its file, from 0."""
    segmentation: Any


@dataclass
class Record:
    """An annotated image. Row i of every array is annotation i. Crowds and difficult objects are included."""

    id: int
    file: str
    size: Size | None
    """(height, width): after the checks the true size, before them the size that the annotation states."""
    boxes: NDArray[np.float64]
    """(N, 4) xyxy in pixels, right and bottom edge exclusive. The checks clip them to the image."""
    labels: NDArray[np.int64]
    """(N,) from 1 to K."""
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float64]
    """(N,) as annotated: the area of the segmentation in COCO, of the box in other formats."""
    segmentation: list[Any] | None = None
    """Per annotation polygons or run lengths as in the file, or None. Checks for masks turn them into compressed
    RLE."""
    annotated_boxes: NDArray[np.float64] | None = None
    """(N, 4) the boxes before they were clipped; None if clipping changed none. Evaluation uses these."""
    annotation_file: str = ""
    """The file that holds the annotations."""
    annotation_indices: NDArray[np.int64] | None = None
    """(N,) places of the annotations in that file, from 0."""
    faults: list[str] = field(default_factory=list)
    """Messages about faults of this image and of annotations that the source or the checks left out."""
    unusable: bool = False
    """Whether the whole image must be left out."""
    file_size: int | None = None
    """Bytes of the image file. The checks set it."""

    def keep_rows(self, rows: NDArray[np.bool_]) -> None:
        """Remove the annotations outside the mask ``rows`` (N,)."""
        if rows.all():
            return
        self.boxes, self.labels, self.area = self.boxes[rows], self.labels[rows], self.area[rows]
        self.crowd, self.difficult = self.crowd[rows], self.difficult[rows]
        if self.annotated_boxes is not None:
            self.annotated_boxes = self.annotated_boxes[rows]
        if self.annotation_indices is not None:
            self.annotation_indices = self.annotation_indices[rows]
        if self.segmentation is not None:
            self.segmentation = [entry for entry, kept in zip(self.segmentation, rows, strict=True) if kept]


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which otherwise scans the millions of objects of a large data set many times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_record(
    id: int, file: str, size: Size | None, annotations: Sequence[Annotation] = (), annotation_file: str = ""
) -> Record:
    """Make a record from the annotations of one image."""
    columns = zip(*annotations, strict=True) if annotations else ((),) * 7
    boxes, labels, area, crowd, difficult, indices, segmentation = columns
    return Record(
        id=id,
        file=file,
        size=size,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array(crowd, dtype=np.bool_),
        difficult=np.array(difficult, dtype=np.bool_),
        area=np.array(area, dtype=np.float64),
        segmentation=None if all(entry is None for entry in segmentation) else list(segmentation),
        annotation_file=annotation_file,
        annotation_indices=np.array(indices, dtype=np.int64),
    )


def make_unusable_record(annotation_file: str, faults: Sequence[str], file: str = "") -> Record:
    """Make a record that carries faults: of an unusable image or, without ``file``, of the annotation file itself."""
    record = make_record(-1, file, None, annotation_file=annotation_file)
    record.faults, record.unusable = list(faults), True
    return record


def open_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image and read its header. No pixel is decoded yet.

    Raises:
        ValueError: the header states more than ``max_pixels`` pixels.
        OSError: the file is missing, or its format is not in FORMATS.
    """
    if max_pixels > 2 * (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow would refuse before the user's own, higher limit is reached
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"{image.width}x{image.height} are more pixels than data.max_pixels={max_pixels}")
    return image


def read_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image into (3, H, W) uint8 RGB and turn it upright by its EXIF tag.

    The file's extension does not matter. Alpha is dropped, 16-bit gray values keep their upper byte, and of an
    animation the first frame is used. The memory layout is (H, W, 3), whichever library decodes.

    Raises:
        DistillError: the file is missing, unreadable, truncated, or its header states more than ``max_pixels`` pixels.
            The message names the file.
    """
    try:
        decoded = _decode_jpeg(str(file), max_pixels)
        if decoded is not None:
            return decoded
        with open_image(file, max_pixels) as image:
            upright = image if exif_orientation(image) == 1 else ImageOps.exif_transpose(image)
            pixels = _to_rgb(upright)
    except Exception as error:  # Pillow's decoders raise exceptions of any type for damaged bytes
        raise DistillError(f"{file}: cannot be read as an image ({error}); replace it, or leave it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(file: str, max_pixels: int) -> Tensor | None:
    """Decode a JPEG by torchvision. Return None for other formats, larger images, and files that torchvision rejects.

    Pillow reads some of those, or reports what is wrong. Pillow is not asked first: reading the header of every file
    would add a tenth of the decoding time.
    """
    with suppress(RuntimeError):
        content = read_file(file)
        size = jpeg_size(memoryview(content.numpy()))
        if size is not None and size[0] * size[1] <= max_pixels:
            decoded: Tensor = decode_jpeg(content, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return decoded
    return None


def jpeg_size(content: bytes | memoryview) -> Size | None:
    """Return (height, width) from the frame header of a JPEG; None if the header does not follow in strict order.

    The decoders allocate by this header. They skip unexpected bytes before a marker. This function stops there instead:
    if it went on, the content of a segment could pass for another, smaller frame header.

    Source: ITU-T T.81, B.1.1 and B.2.2: a segment is a marker, a length that includes its own two bytes, and content.
    """
    position = 2 if content[:2] == b"\xff\xd8" else len(content)
    while position + 9 <= len(content) and content[position] == 0xFF and content[position + 1] not in BARE_MARKERS:
        length, height, width = (
            int.from_bytes(content[position + offset : position + offset + 2], "big") for offset in (2, 5, 7)
        )
        if content[position + 1] in FRAME_MARKERS:
            return height, width
        position += 2 + length
    return None


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open image, 1 if there is none. XMP's tag is ignored, as by torchvision."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        return int(exif.get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged tag counts as no tag
        return 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floats")
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip all values above 255
        gray = (np.array(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


@paused_garbage_collection()
def coco_ground_truth(records: Sequence[Record], classes: Sequence[str]) -> dict[str, Any]:
    """Convert records into COCO's JSON form, in pixels of the original images.

    ``category_id`` is the label. VOC's mark of difficult objects becomes the key ``difficult``.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        height, width = record.size or (0, 0)
        images.append({"id": record.id, "file_name": record.file, "height": height, "width": width})
        boxes = record.boxes if record.annotated_boxes is None else record.annotated_boxes
        rows = zip(
            boxes.tolist(),
            record.labels.tolist(),
            record.crowd,
            record.difficult,
            record.area.tolist(),
            record.segmentation or [None] * len(record.labels),
            strict=True,
        )
        for (x1, y1, x2, y2), label, crowd, difficult, area, segmentation in rows:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record.id,
                "category_id": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area,
                "iscrowd": int(crowd),
                "difficult": int(difficult),
            }
            annotations.append(annotation if segmentation is None else annotation | {"segmentation": segmentation})
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
