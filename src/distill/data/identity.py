"""The identity of data: hashes by which a checkpoint or a measured AP recognizes the data that it was made on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from distill.data.records import Record, pack_records


def digest_records(records: Sequence[Record], masks: bool) -> dict[str, Any]:
    """Return the numbers of images and boxes, and a SHA-256 hash of the records without the paths of their files.

    The hash includes the segmentations only with `masks`.
    """
    columns = pack_records(records)
    # Checkpoints hold this hash: its input is, image by image, a list in JSON and the bytes of the arrays.
    digest = hashlib.sha256()
    arrays = (columns.boxes, columns.labels, columns.crowd, columns.difficult, columns.area)
    contents = [(memoryview(array.tobytes()), array.nbytes // max(1, len(array))) for array in arrays]
    numbers = zip(columns.ids.tolist(), columns.sizes.tolist(), columns.file_sizes.tolist(), strict=True)
    for index, (id, (height, width), file_size) in enumerate(numbers):
        rows = columns.rows(index)
        size = f"[{height}, {width}]" if height and width else "null"
        bytes_of_file = "null" if file_size < 0 else file_size
        digest.update(f"[{id}, {size}, {bytes_of_file}, {rows.stop - rows.start}]".encode())
        for content, row_size in contents:
            digest.update(content[rows.start * row_size : rows.stop * row_size])
        if masks:
            segmentations = [columns.segmentation(row) for row in range(rows.start, rows.stop)]
            digest.update(json.dumps(segmentations, default=str).encode())
    return {"images": len(columns), "boxes": len(columns.labels), "sha256": digest.hexdigest()}


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the data of a checkpoint and other data, one text each.

    Args:
        before: `classes`, and under `train` and `val` what `digest_records` returned for the checkpoint's data.
        now: the same for the other data.
    """
    differences = []
    if before["classes"] != now["classes"]:
        differences.append(f"classes: {before['classes']} there, {now['classes']} here")
    for split in ("train", "val"):
        there, here = (f"{data[split]['images']} images with {data[split]['boxes']} boxes" for data in (before, now))
        if there != here:
            differences.append(f"{split}: {there} there, {here} here")
        elif before[split] != now[split]:
            differences.append(f"{split}: {there} as there, but other ids, sizes, boxes, labels or files")
    unlabeled = [data.get("unlabeled") for data in (before, now)]
    if unlabeled[0] != unlabeled[1]:
        there, here = (f"{part['images']} images with {part['boxes']} boxes" if part else "none" for part in unlabeled)
        of = f"{there} as there, but other images" if there == here else f"{there} there, {here} here"
        differences.append(f"data.unlabeled: {of}")
    return differences
