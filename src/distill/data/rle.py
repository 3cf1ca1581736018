"""Instance masks as run-length codes: a few hundred bytes where the pixels of an image take a megabyte.

A code is the ``counts`` of COCO's compressed form: column by column, the lengths of runs of 0 and of 1 in turn, written
as printable bytes. pycocotools codes and decodes; what it would take without a look is checked here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from distill.types import Size

MAX_POLYGON_REACH = 10
"""A polygon may leave the image by this many times its longer side; beyond, its unit is not the pixel."""


def encode_masks(masks: Tensor) -> list[bytes]:
    """Codes of masks (N, H, W), bool or uint8 of 0 and 1, on any device."""
    if not len(masks):
        return []
    columns = masks.detach().to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [each["counts"] for each in coco.encode(columns.T)]  # (H, W, N) in Fortran's order, without a copy


def decode_mask(code: bytes, size: Size) -> Tensor:
    """The mask (H, W), uint8 of 0 and 1, behind a code for an image of this (height, width)."""
    return torch.from_numpy(coco.decode({"size": list(size), "counts": code}))


def mask_area(code: bytes, size: Size) -> int:
    """Number of pixels of a mask."""
    return int(coco.area({"size": list(size), "counts": code}))


def to_coco(code: bytes, size: Size) -> dict[str, Any]:
    """A code as COCO's JSON writes it."""
    return {"size": list(size), "counts": code.decode()}


def encode_segmentation(segmentation: Any, size: Size) -> bytes:
    """The code of what a COCO file says of one object: polygons, or run lengths, compressed or not.

    Args:
        segmentation: the annotation's entry.
        size: (height, width) of the image.

    Raises:
        ValueError: says what is wrong with it.
    """
    if isinstance(segmentation, Mapping):
        return _encode_runs(segmentation, size)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and segmentation:
        polygons = [_validate_polygon(polygon, size) for polygon in segmentation]
        return bytes(coco.merge(coco.frPyObjects(polygons, *size))["counts"])
    raise ValueError(f"needs polygons or run lengths, got {shown(segmentation)}")


def _validate_polygon(polygon: Any, size: Size) -> list[float]:
    """x and y in turn. Four numbers would mean a box to pycocotools, and far corners cost it a run for each pixel."""
    points = _to_array(polygon)
    if points.dtype.kind not in "iuf" or len(points) < 6 or len(points) % 2:
        raise ValueError(f"needs three or more corners a polygon, as [x1, y1, x2, y2, ...], got {shown(polygon)}")
    if not np.isfinite(points).all() or np.abs(points).max() > MAX_POLYGON_REACH * max(size):
        raise ValueError(f"has a polygon far outside its image of {size[1]}x{size[0]}: {shown(polygon)}")
    corners: list[float] = points.tolist()
    return corners


def _encode_runs(entry: Mapping[str, Any], size: Size) -> bytes:
    counts = entry.get("counts")
    if list(size) != entry.get("size"):
        raise ValueError(f"needs 'size' {list(size)}, its image's height and width, got {shown(entry.get('size'))}")
    if isinstance(counts, (str, bytes)):
        code = counts.encode() if isinstance(counts, str) else counts
        _validate_runs(_decode_runs(code), size)
        return code
    runs = _to_array(counts)
    if runs.dtype.kind not in "iu":
        raise ValueError(f"needs 'counts', a text or a list of integers, got {shown(counts)}")
    _validate_runs(runs, size)
    return bytes(coco.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)["counts"])


def _to_array(values: Any) -> NDArray[Any]:
    """A flat list as an array; an empty one where it is none."""
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of different lengths
        return np.empty(0)
    return numbers if numbers.ndim == 1 else np.empty(0)


def _validate_runs(runs: NDArray[Any], size: Size) -> None:
    """What falls short of the image, pycocotools would fill with whatever lies in memory."""
    pixels = size[0] * size[1]
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(
            f"has runs that do not add up to its image's {size[1]}x{size[0]} pixels: {shown(runs.tolist())}"
        )


def _decode_runs(code: bytes) -> NDArray[np.int64]:
    """The run lengths of a code.

    A number is written as digits to the base 32, the lowest first, each as the character 48 + digit, with 32 added if
    another follows; the last digit's highest bit is the sign. From the fourth on, it is the difference to the last but
    one (rleFrString of the COCO API).
    """
    digits = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError(f"has 'counts' that are no run-length code: {shown(code)}")
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        raise ValueError(f"has 'counts' that are no run-length code: {shown(code)}")
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * places), starts)
    values -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    for every in (slice(1, None, 2), slice(2, None, 2)):
        values[every] = np.cumsum(values[every])
    return values
