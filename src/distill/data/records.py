"""One image and its annotations, in pixels of the original image."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
