"""Data and a batch that the tests of measurements share."""

from __future__ import annotations

from typing import Any

import pytest

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.types import Batch


@pytest.fixture(scope="module")
def data() -> DetectionData:
    return DetectionData(Shapes(train=6, val=4, test=0, size=64), 2, workers=0, min_size=64, max_size=64)


@pytest.fixture
def batch(data: DetectionData) -> Batch:
    first: Any = next(iter(data.train_dataloader()))
    return first  # type: ignore[no-any-return]
