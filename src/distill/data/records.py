"""One image and its annotations, in pixels of the original image."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from distill.data.packed_bytes import PackedBytes
from distill.types import Size


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


NULL = b"null"
"""JSON of a missing segmentation."""
IMAGE_ARRAYS = ("ids", "sizes", "file_sizes", "unusable")
ROW_ARRAYS = ("boxes", "labels", "crowd", "difficult", "area", "annotation_indices")
PACKED_COLUMNS = ("files", "annotation_files", "segmentations")
"""Columns of `Records`: arrays by image, arrays by annotation, and byte strings. `ends` is another."""
MAX_SIDE = 2**62
"""Larger stated sides of images are lowered to this number, which is no less wrong, to fit into int64."""


@dataclass
class Records(Sequence[Record]):
    """The annotated images of a split as columns: one array per field in place of an object per image and box.

    An image column has N entries, one per image. A row column has M entries, one per annotation; the annotations of an
    image are consecutive. `records[i]` is image i as a `Record`, whose arrays are views of the row columns.
    """

    ids: NDArray[np.int64]
    """(N,)"""
    files: PackedBytes
    """N paths."""
    sizes: NDArray[np.int64]
    """(N, 2) heights and widths. 0 stands for an unknown size."""
    annotation_files: PackedBytes
    """N paths of the files that hold the annotations."""
    file_sizes: NDArray[np.int64]
    """(N,) bytes of the image files. -1 stands for an unknown size."""
    unusable: NDArray[np.bool_]
    """(N,) whether the whole image must be left out."""
    ends: NDArray[np.int64]
    """(N,) the row after the last row of each image."""
    boxes: NDArray[np.float64]
    """(M, 4), like all row columns as in `Record`."""
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float64]
    annotation_indices: NDArray[np.int64]
    segmentations: PackedBytes
    """M segmentations as JSON. `null` stands for none."""
    annotated_boxes: NDArray[np.float64] | None = None
    """(M, 4) the boxes before they were clipped; None if no box was clipped."""
    faults: dict[int, list[str]] = field(default_factory=dict)
    """Messages by index of their image."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Counts of what the source changed or ignored without harm, for the data line."""

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        index = range(len(self))[index]
        rows = self.rows(index)
        height, width = self.sizes[index].tolist()
        segmentation = [self.segmentation(row) for row in range(rows.start, rows.stop)]
        return Record(
            id=int(self.ids[index]),
            file=self.files.text(index),
            size=(height, width) if height and width else None,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            difficult=self.difficult[rows],
            area=self.area[rows],
            segmentation=None if all(entry is None for entry in segmentation) else segmentation,
            annotated_boxes=None if self.annotated_boxes is None else self.annotated_boxes[rows],
            annotation_file=self.annotation_files.text(index),
            annotation_indices=self.annotation_indices[rows],
            faults=list(self.faults.get(index, ())),
            unusable=bool(self.unusable[index]),
            file_size=None if self.file_sizes[index] < 0 else int(self.file_sizes[index]),
        )

    def rows(self, index: int) -> slice:
        """Return the rows of the annotations of an image."""
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def row_counts(self) -> NDArray[np.int64]:
        """Return the number of annotations of each image (N,)."""
        return np.diff(self.ends, prepend=0)

    def row_images(self) -> NDArray[np.int64]:
        """Return the index of the image of each annotation (M,)."""
        return np.repeat(np.arange(len(self)), self.row_counts())

    def segmentation(self, row: int) -> Any:
        """Return the segmentation of an annotation as in its file, or None."""
        return decode_segmentation(self.segmentations[row])

    def add_fault(self, index: int, message: str) -> None:
        """Add a message about an image or about one of its annotations."""
        self.faults.setdefault(index, []).append(message)

    def keep_rows(self, rows: NDArray[np.bool_]) -> None:
        """Remove the annotations outside the mask ``rows`` (M,)."""
        if rows.all():
            return
        kept = np.bincount(self.row_images()[rows], minlength=len(self))
        for name in (*ROW_ARRAYS, "annotated_boxes"):
            column = getattr(self, name)
            setattr(self, name, None if column is None else column[rows])
        self.segmentations = self.segmentations.select(rows)
        self.ends = np.cumsum(kept)

    def select(self, images: NDArray[np.bool_]) -> Records:
        """Return the images of the mask ``images`` (N,), without faults and remarks."""
        if images.all():
            return replace(self, faults={}, remarks=Counter())
        part = replace(self, faults={}, remarks=Counter())
        part.keep_rows(images[self.row_images()])
        part.ends = part.ends[images]
        for name in IMAGE_ARRAYS:
            setattr(part, name, getattr(self, name)[images])
        part.files, part.annotation_files = self.files.select(images), self.annotation_files.select(images)
        return part


def join_records(parts: Sequence[Records]) -> Records:
    """Return the images of all parts, with their faults and remarks, as their source read them.

    The ids stay as they are.
    """
    if len(parts) == 1:
        return parts[0]
    images = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    rows = np.cumsum([0, *(len(part.labels) for part in parts)]).tolist()
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in (*IMAGE_ARRAYS, *ROW_ARRAYS)
    }
    columns |= {name: PackedBytes.join([getattr(part, name) for part in parts]) for name in PACKED_COLUMNS}
    return Records(
        **columns,
        ends=np.concatenate([part.ends + first for part, first in zip(parts, rows, strict=False)]),
        faults={
            first + index: list(faults)
            for part, first in zip(parts, images, strict=False)
            for index, faults in part.faults.items()
        },
        remarks=sum((part.remarks for part in parts), Counter()),
    )


def decode_segmentation(content: bytes) -> Any:
    """Return a segmentation from its JSON."""
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError:  # NaN, and numbers too large for a float
        return json.loads(content)


def pack_records(records: Sequence[Record]) -> Records:
    """Convert records to columns. Columns are returned as they are."""
    if isinstance(records, Records):
        return records
    rows = [len(record.labels) for record in records]

    def join(name: str, *shape: int) -> NDArray[Any]:
        empty: NDArray[Any] = np.empty((0, *shape), dtype=ROW_TYPES[name])
        return np.concatenate([empty, *(getattr(record, name) for record in records)])

    clipped = any(record.annotated_boxes is not None for record in records)
    annotated = [record.boxes if record.annotated_boxes is None else record.annotated_boxes for record in records]
    places = [
        np.arange(count) if record.annotation_indices is None else record.annotation_indices
        for record, count in zip(records, rows, strict=True)
    ]
    segmentations = [
        NULL if entry is None else json.dumps(entry, default=_to_plain).encode()
        for record, count in zip(records, rows, strict=True)
        for entry in record.segmentation or [None] * count
    ]
    return Records(
        ids=np.array([record.id for record in records], dtype=np.int64),
        files=PackedBytes.pack_texts([record.file for record in records]),
        sizes=np.array(
            [[min(max(side, -MAX_SIDE), MAX_SIDE) for side in record.size or (0, 0)] for record in records],
            dtype=np.int64,
        ).reshape(-1, 2),
        annotation_files=PackedBytes.pack_texts([record.annotation_file for record in records]),
        file_sizes=np.array(
            [-1 if record.file_size is None else record.file_size for record in records], dtype=np.int64
        ),
        unusable=np.array([record.unusable for record in records], dtype=np.bool_),
        ends=np.cumsum(np.array(rows, dtype=np.int64)),
        boxes=join("boxes", 4),
        labels=join("labels"),
        crowd=join("crowd"),
        difficult=join("difficult"),
        area=join("area"),
        annotation_indices=np.concatenate([np.empty(0, np.int64), *places]),
        segmentations=PackedBytes.pack(segmentations),
        annotated_boxes=np.concatenate([np.empty((0, 4)), *annotated]) if clipped else None,
        faults={index: list(record.faults) for index, record in enumerate(records) if record.faults},
    )


ROW_TYPES = {"boxes": np.float64, "labels": np.int64, "crowd": np.bool_, "difficult": np.bool_, "area": np.float64}


def _to_plain(value: Any) -> Any:
    """Convert bytes and arrays, which JSON lacks, for `json.dumps`."""
    return value.decode() if isinstance(value, bytes) else value.tolist()


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


@paused_garbage_collection()
def coco_ground_truth(records: Sequence[Record], classes: Sequence[str]) -> dict[str, Any]:
    """Convert records into COCO's JSON form, in pixels of the original images.

    ``category_id`` is the label. VOC's mark of difficult objects becomes the key ``difficult``.
    """
    columns = pack_records(records)
    sizes = columns.sizes.tolist()
    ids = columns.ids.tolist()
    images = [
        {"id": id, "file_name": file, "height": height, "width": width}
        for id, file, (height, width) in zip(ids, columns.files.texts(), sizes, strict=True)
    ]
    boxes = columns.boxes if columns.annotated_boxes is None else columns.annotated_boxes
    rows = zip(
        columns.ids[columns.row_images()].tolist(),
        boxes.tolist(),
        columns.labels.tolist(),
        columns.crowd.tolist(),
        columns.difficult.tolist(),
        columns.area.tolist(),
        strict=True,
    )
    annotations: list[dict[str, Any]] = []
    for row, (image, (x1, y1, x2, y2), label, crowd, difficult, area) in enumerate(rows):
        annotation = {
            "id": row + 1,
            "image_id": image,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "iscrowd": int(crowd),
            "difficult": int(difficult),
        }
        segmentation = columns.segmentation(row)
        annotations.append(annotation if segmentation is None else annotation | {"segmentation": segmentation})
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
