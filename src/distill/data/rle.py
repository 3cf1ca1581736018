"""Instance masks as run-length codes. A code takes a few hundred bytes; the pixels of an image take a megabyte.

A code is the `counts` of COCO's compressed form: the lengths of alternating runs of 0 and 1, column by column, written
as printable bytes. pycocotools encodes and decodes. It does not validate its input, so this module does that first.
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
from torch.nn.functional import interpolate

from distill.types import Size

MAX_POLYGON_REACH = 10
"""Largest absolute coordinate of a polygon, in units of the image's longer side.

Larger coordinates are no pixels.
"""


def encode_masks(masks: Tensor) -> list[bytes]:
    """Encode masks (N, H, W), bool or uint8 of 0 and 1, on any device, as N codes."""
    if not len(masks):
        return []
    columns = masks.detach().to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [code["counts"] for code in coco.encode(columns.T)]  # (H, W, N) in Fortran order, without a copy


def decode_mask(code: bytes, size: Size) -> Tensor:
    """Decode the code of an image of this (height, width) to a mask (H, W), uint8 of 0 and 1."""
    return torch.from_numpy(coco.decode({"size": list(size), "counts": code}))


def mask_area(code: bytes, size: Size) -> int:
    """Return the number of pixels of a mask. `size` is (height, width)."""
    return int(coco.area({"size": list(size), "counts": code}))


def to_coco(code: bytes, size: Size) -> dict[str, Any]:
    """Return a code in the form of COCO's JSON files: `size` (height, width) and `counts` as text."""
    return {"size": list(size), "counts": code.decode()}


def encode_segmentation(segmentation: Any, size: Size) -> bytes:
    """Encode the segmentation of one object of a COCO file.

    Args:
        segmentation: the entry of the annotation: polygons, or run lengths, compressed or not.
        size: (height, width) of the image.

    Raises:
        ValueError: the segmentation is invalid. The message says why.
    """
    if isinstance(segmentation, Mapping):
        return _encode_runs(segmentation, size)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and segmentation:
        polygons = [
            _validate_polygon(polygon, size)
            for polygon in segmentation
            if count_degenerate(segmentation) == len(segmentation) or not _is_degenerate(polygon)
        ]
        return bytes(coco.merge(coco.frPyObjects(polygons, *size))["counts"])
    raise ValueError(f"needs polygons or run lengths, got {shown(segmentation)}")


def count_degenerate(segmentation: Any) -> int:
    """Return the number of polygons with one or two corners, or none. They have no area.

    Among other polygons they are ignored.
    """
    return 0 if isinstance(segmentation, Mapping) else sum(map(_is_degenerate, segmentation))


def _is_degenerate(polygon: Any) -> bool:
    return isinstance(polygon, Sequence) and len(polygon) in (0, 2, 4) and _to_array(polygon).dtype.kind in "iuf"


def _validate_polygon(polygon: Any, size: Size) -> list[float]:
    """Return the corners of a polygon as a list [x1, y1, x2, y2, ...].

    Two kinds are refused: pycocotools takes four numbers for a box, and spends a run per pixel on corners far outside.
    """
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
    """Return a flat list as an array. Any other value gives an empty array."""
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of different lengths
        return np.empty(0)
    return numbers if numbers.ndim == 1 else np.empty(0)


def _validate_runs(runs: NDArray[Any], size: Size) -> None:
    """Require that the runs add up to the image: pycocotools fills missing pixels with uninitialized memory."""
    pixels = size[0] * size[1]
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(
            f"has runs that do not add up to its image's {size[1]}x{size[0]} pixels: {shown(runs.tolist())}"
        )


def _decode_runs(code: bytes) -> NDArray[np.int64]:
    """Decode a code to its run lengths.

    The format is that of `rleFrString` in the COCO API. A number is written as digits to the base 32, the lowest digit
    first. A digit is written as the character 48 + digit; 32 is added if another digit follows. The highest bit of the
    last digit is the sign. From the fourth number on, the code holds the difference to the run length two places
    before.
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
    for alternate in (slice(1, None, 2), slice(2, None, 2)):
        values[alternate] = np.cumsum(values[alternate])
    return values


def resize_masks(codes: Sequence[bytes], old: Size, new: Size) -> Tensor:
    """Decode masks and resize them to (N, h, w) uint8 by the nearest pixel, as torchvision's detectors do.

    Masks are processed one by one, so memory holds only one mask at the size of the original image.

    Args:
        codes: N run-length codes of masks of size ``old``.
        old: (height, width) of the original image.
        new: (height, width) of the result.
    """
    masks = torch.empty(len(codes), *new, dtype=torch.uint8)
    for row, code in zip(masks, codes, strict=True):
        row.copy_(resize_mask(decode_mask(code, old), new))
    return masks


def resize_mask(mask: Tensor, size: Size) -> Tensor:
    """Resize a mask (H, W) uint8 to (height, width) by the nearest pixel."""
    return interpolate(mask[None, None], size=size, mode="nearest")[0, 0]
