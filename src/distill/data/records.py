"""One image and its annotations, as every source gives them: in original pixels, before any resize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from distill.types import DistillError, Size


@dataclass
class Record:
    """An image as annotated. Row i of every array is annotation i, crowds and difficult objects included."""

    id: int
    file: str
    size: Size | None
    """(height, width) that the annotation states; the true one once checked."""
    boxes: NDArray[np.float64]
    """(N, 4) xyxy in pixels, right and bottom edge exclusive."""
    labels: NDArray[np.int64]
    """(N,) from 1 to K."""
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float64]
    """(N,) as annotated: of the segmentation in COCO, of the box elsewhere."""
    segmentation: list[Any] | None = None
    """Per annotation polygons or RLE as they stand in the file, or None."""
    annotated: NDArray[np.float64] | None = None
    """The boxes before they were clipped to the image, where that changed any: evaluation measures by these."""
    faults: list[str] = field(default_factory=list)
    """What its source found wrong with it: annotations named here were left out."""
    broken: bool = False
    """Whether the image cannot be used at all."""

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Drop the annotations that are not in ``rows`` (N,)."""
        self.boxes, self.labels, self.area = self.boxes[rows], self.labels[rows], self.area[rows]
        self.crowd, self.difficult = self.crowd[rows], self.difficult[rows]
        if self.annotated is not None:
            self.annotated = self.annotated[rows]
        if self.segmentation is not None:
            self.segmentation = [each for each, kept in zip(self.segmentation, rows, strict=True) if kept]


def record(
    id: int, file: str, size: Size | None, notes: Sequence[tuple[Sequence[float], int, bool, bool, float]]
) -> Record:
    """A record from rows of (xyxy box, label, crowd, difficult, area)."""
    boxes, labels, crowd, difficult, area = zip(*notes, strict=True) if notes else ((), (), (), (), ())
    return Record(
        id=id,
        file=file,
        size=size,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array(crowd, dtype=np.bool_),
        difficult=np.array(difficult, dtype=np.bool_),
        area=np.array(area, dtype=np.float64),
    )


def read_image(file: str | Path) -> Tensor:
    """Decode an image into (3, H, W) uint8 RGB, turned upright by its EXIF tag, whatever its extension says.

    Raises:
        DistillError: missing, unreadable or truncated; names the file.
    """
    try:
        decoded: Tensor = decode_image(str(file), mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return decoded
    except (RuntimeError, OSError, ValueError):
        # torchvision knows fewer formats than Pillow; a damaged file fails here as well, with a reason.
        try:
            with Image.open(file) as image:
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DistillError(f"{file}: cannot be read as an image ({error}); replace or remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def ground_truth(records: Sequence[Record], classes: Sequence[str]) -> dict[str, Any]:
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
