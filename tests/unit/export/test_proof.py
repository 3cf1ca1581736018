from __future__ import annotations

import pytest

from distill.export.proof import spread


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(5, 200, [0, 1, 2, 3, 4]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (9, 1, [0]), (1, 4, [0])],
)
def test_images_are_spread_over_the_split(count: int, limit: int, expected: list[int]) -> None:
    assert spread(count, limit) == expected
