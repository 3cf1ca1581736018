"""Bilinear sampling by gathers has the values of torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distill.export.query_graphs import sample_by_gathers


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (8, 8)])
def test_sampling_equals_grid_sample_inside_at_the_edges_and_outside(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64)
    points = 3 * torch.rand(3, 50, 6, 2, generator=generator, dtype=torch.float64) - 1.5
    edges = torch.tensor([-1e6, -2, -1, -1 + 1 / size[1], 0, 1 - 1 / size[0], 1, 2, 1e6], dtype=torch.float64)
    points[0, : len(edges), 0] = edges[:, None]
    points[1, : len(edges), 0, 0] = edges
    expected = F.grid_sample(maps, points, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(sample_by_gathers(maps, points), expected, rtol=1e-12, atol=1e-12)


def test_another_kind_of_sampling_is_not_replaced_silently() -> None:
    maps, points = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 2)
    for other in ({"mode": "nearest"}, {"padding_mode": "border"}, {"align_corners": True}):
        with pytest.raises(AssertionError, match="another way"):
            sample_by_gathers(maps, points, **other)  # type: ignore[arg-type]
