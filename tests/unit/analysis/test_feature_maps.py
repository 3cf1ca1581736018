"""Functions on feature maps against loops over cells, and CKA against its textbook formula."""

from __future__ import annotations

import math

import pytest
import torch
from kornia.metrics import ssim
from torch import Tensor

from distill.analysis.feature_maps import (
    CKA,
    channel_distances,
    edge_matrix,
    gradient_norms,
    object_cells,
    part_means,
    ssim_map,
)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BOXES = [torch.tensor([[0.0, 0.0, 16.0, 8.0]]), torch.zeros(0, 4)]
CELLS = object_cells(BOXES, [(24, 32), (32, 20)], {8: (4, 4), 16: (2, 2)})


def test_cells_of_objects_and_padding() -> None:
    """The object is 16 by 8 pixels, so it lies on the finest level only; 20 pixels are two and a half cells."""
    inside, outside = CELLS[8]
    assert inside[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert not inside[1].any()
    assert outside[0].sum() == 3 * 4 - 2
    assert outside[1].int().tolist() == [[1, 1, 1, 0]] * 4
    assert not CELLS[16].inside.any()
    assert CELLS[16].outside.int().tolist() == [[[1, 1], [1, 1]]] * 2


def test_means_and_distances_equal_loops() -> None:
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    distances, sums = channel_distances(student, teacher, CELLS[8]), part_means(student[:, 0], CELLS[8])
    for row, part in enumerate(CELLS[8]):
        places = part.nonzero().tolist()
        assert distances[row, -1] == sums[row, 1] == len(places)
        assert float(sums[row, 0]) == pytest.approx(sum(float(student[b, 0, y, x]) for b, y, x in places), abs=1e-5)
        for channel in range(3):
            total = sum(abs(float(student[b, channel, y, x] - teacher[b, channel, y, x])) for b, y, x in places)
            assert float(distances[row, channel]) == pytest.approx(total, abs=1e-5)


def test_ssim_is_kornias_mean_over_channels() -> None:
    student, teacher = maps(2, 3, 12, 14), maps(2, 3, 12, 14, seed=1)
    unit = [
        (x - x.amin((2, 3), keepdim=True)) / (x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True) + 1e-6)
        for x in (student, teacher)
    ]
    expected = ssim(*unit, window_size=11).clamp(-1, 1).mean(1)
    torch.testing.assert_close(ssim_map(student, teacher), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ssim_map(student, student), torch.ones(2, 12, 14))


def test_gradient_norms() -> None:
    neck = {4: maps(1, 2, 2, 2).requires_grad_(), 8: maps(1, 2, 1, 1).requires_grad_()}
    weight = torch.tensor([3.0, 4.0])[None, :, None, None]
    norms = gradient_norms((neck[4] * weight)[..., 0].sum(), neck)
    assert norms[4].tolist() == [[[5, 0], [5, 0]]]
    assert norms[8].tolist() == [[[0]]]


def test_edges_are_cosines() -> None:
    features = maps(3, 2, 7, 7)
    edges = edge_matrix(features)
    for i in range(3):
        for j in range(3):
            a, b = features[i].flatten(), features[j].flatten()
            assert float(edges[i, j]) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)


def textbook_cka(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the Gram matrices of the cells, x and y (N, C)."""
    center = torch.eye(len(x)) - 1 / len(x)
    grams = [center @ (z @ z.T) @ center for z in (x, y)]
    products = [float((a * b).sum()) for a, b in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1]))]
    return products[0] / math.sqrt(products[1] * products[2])


def test_cka_in_parts_is_that_of_all_cells() -> None:
    student, teacher = maps(4, 3, 4, 5), maps(4, 6, 4, 5, seed=1)
    teacher[:, :2] += student[:, :2]
    part = maps(4, 4, 5, seed=2) > 0
    cka = CKA()
    for half in (slice(0, 2), slice(2, 4)):
        cka.add(student[half], teacher[half], part[half])
    expected = textbook_cka(student.movedim(1, -1)[part], teacher.movedim(1, -1)[part])
    assert cka.value() == pytest.approx(expected, abs=1e-5)
    assert 0.05 < expected < 0.95


def test_cka_is_one_for_a_rotation_and_nan_for_constants() -> None:
    student, every = maps(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    rotation = torch.linalg.qr(maps(3, 3, seed=3)).Q
    turned, constant = CKA(), CKA()
    turned.add(student, 2 * torch.einsum("ij,bjhw->bihw", rotation, student) + 1, every)
    constant.add(student, torch.ones_like(student), every)
    assert turned.value() == pytest.approx(1, abs=1e-5)
    assert math.isnan(constant.value())
    assert math.isnan(CKA().value())
