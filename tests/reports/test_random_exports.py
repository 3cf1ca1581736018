"""Valid data sets in random forms: their classes, boxes and pixels are those of the plain data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from distill.data.checks import check_records
from distill.data.coco import Coco
from distill.data.layouts import recognize
from distill.data.voc import Voc
from distill.data.yolo import Yolo
from distill.imaging.decoding import read_image
from helpers.random_exports import Export, Picture, draw_pictures, write_coco, write_voc, write_yolo

FORMATS: Mapping[str, tuple[Callable[[Export, dict[str, list[Picture]]], dict[str, Any]], Any]] = {
    "coco": (write_coco, Coco),
    "voc": (write_voc, Voc),
    "yolo": (write_yolo, Yolo),
}
DAILY, ALL = 10, 170
"""Seeds per format."""


@pytest.mark.parametrize("option", FORMATS)
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.exhaustive] if seed >= DAILY else []) for seed in range(ALL)]
)
def test_a_random_export_is_the_plain_data_set(tmp_path: Path, option: str, seed: int) -> None:
    truth = draw_pictures(Random(seed))
    export = Export(tmp_path, Random(1000 + seed))
    write, source_type = FORMATS[option]
    options = write(export, truth)
    source = source_type(**options)
    for split, pictures in truth.items():
        classes, annotated = source.read_split(split)
        records, _ = check_records(annotated, split)
        numbers = []
        for record in records:
            (number,) = map(int, re.findall(r"pic(\d+)", Path(record.file).name))
            numbers.append(number)
            (picture,) = (picture for picture in pictures if picture.number == number)
            rows = zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
            boxes = sorted((classes[label - 1], *np.round(box, 3).tolist()) for label, box in rows)
            assert boxes == sorted((name, *map(float, box)) for name, box in picture.boxes), export.choices
            pixels = read_image(record.file).permute(1, 2, 0).numpy()
            assert record.size == picture.size == pixels.shape[:2], export.choices
            difference = np.abs(pixels.astype(int) - picture.pixels)
            limit = 4 if Path(record.file).suffix.lower() == ".jpg" else 0
            assert difference.mean() <= limit, export.choices
        assert sorted(numbers) == [picture.number for picture in pictures], export.choices
        assert set(classes) == {"cat", "dog", "traffic light", "Käse"}
    if not isinstance(options.get("train", {}).get("annotations"), list):  # joined files are named by their key
        assert recognize(tmp_path).option == option
