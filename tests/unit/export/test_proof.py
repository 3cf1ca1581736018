from __future__ import annotations

import pytest

from distill.export.parity import Parity
from distill.export.proof import ProgramRow, Proof, spread
from distill.types import DistillError


def proof_of(student: dict[str, float], exported: dict[str, float]) -> Proof:
    rows = [ProgramRow("", results, 1.0, []) for results in (student, exported)]
    return Proof(4, "val", "cpu", Parity(4, 0, 0, 0, 0.0, 0.0, 0.0), *rows)


def test_the_loss_is_that_of_the_runs_own_metric() -> None:
    assert proof_of({"mAP": 0.5}, {"mAP": 0.4}).loss == pytest.approx(10)
    assert proof_of({"AP50": 0.7, "AP": 0.5}, {"AP50": 0.1, "AP": 0.4}).loss == pytest.approx(10)
    with pytest.raises(DistillError, match="metrics=coco or voc"):
        _ = proof_of({"recall": 0.5}, {"recall": 0.4}).loss


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(5, 200, [0, 1, 2, 3, 4]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (9, 1, [0]), (1, 4, [0])],
)
def test_images_are_spread_over_the_split(count: int, limit: int, expected: list[int]) -> None:
    assert spread(count, limit) == expected
