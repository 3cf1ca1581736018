"""Advice about data that is valid, but trains badly."""

from __future__ import annotations

from distill.data.advice import training_advice
from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes


def advice(size: int, train: int = 100, **options: object) -> str:
    data = DetectionData(Shapes(train=train, val=2, test=0, size=64), min_size=size, max_size=size, workers=0)
    return " / ".join(training_advice(data, **options))  # type: ignore[arg-type]


def test_good_data_gets_none() -> None:
    assert advice(64) == advice(90) == ""


def test_images_are_enlarged() -> None:
    assert "images of 64x64 px are enlarged to 256x256 px, 16 times the pixels" in advice(256)
    assert advice(256, size_is_chosen=True) == ""


def test_few_images_of_a_class() -> None:
    data = DetectionData(Shapes(train=8, val=2, test=0, size=64), min_size=64, max_size=64, workers=0)
    records = data.records("train")
    circles = len(set(records.row_images()[records.labels == 1].tolist()))
    assert f"fewer than 10 training images have a box of circle ({circles})" in " / ".join(training_advice(data))


def test_a_class_without_boxes() -> None:
    data = DetectionData(Shapes(train=100, val=2, test=0, size=64), min_size=64, max_size=64, workers=0)
    records = data.records("train")
    records.labels[records.labels == 2] = 1
    assert training_advice(data) == [
        "no training image has a box of square: the model cannot learn these classes. Leave them out with "
        "data.source.classes"
    ]
