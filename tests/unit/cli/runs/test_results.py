"""The results that a run recorded, and whether they hold for other images and metrics."""

from __future__ import annotations

from typing import Any

import pytest

from distill.cli.runs.results import fingerprints, is_measured_on
from distill.types import DistillError


class Data:
    """Data with a split that cannot be read."""

    def has_split(self, split: str) -> bool:
        return split in ("val", "broken")

    def fingerprint(self, split: str) -> str:
        if split == "broken":
            raise DistillError("cannot be read")
        return "a"


METRICS = {"coco": {"per_class": False}}


@pytest.mark.parametrize(
    ("split", "fingerprint", "metrics", "expected"),
    [
        ("val", "a", METRICS, True),
        ("val", "b", METRICS, False),
        ("val", "a", {"voc": {}}, False),
        ("test", "a", METRICS, False),
        ("broken", "a", METRICS, False),
    ],
)
def test_results_hold_for_the_same_images_and_metrics(
    split: str, fingerprint: str, metrics: dict[str, Any], expected: bool
) -> None:
    data: Any = Data()
    summary = {"measured": {"metrics": METRICS, "data": {split: fingerprint}}}
    assert is_measured_on(summary, metrics, data, split) is expected


@pytest.mark.parametrize("summary", [{}, {"measured": None}, {"measured": {"metrics": METRICS}}, {"measured": []}])
def test_a_summary_without_fingerprints_holds_for_no_images(summary: dict[str, Any]) -> None:
    data: Any = Data()
    assert fingerprints(summary) == {}
    assert not is_measured_on(summary, METRICS, data, "val")
