"""Prototypes against slow loops over cells, pairs and atoms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.losses.prototypes import box_means, choose_prototypes, dense, matching_pursuit
from helpers.fake_view import corners


def random_features(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_means_equal_loops_over_cells(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 6, 9, generator=generator, dtype=dtype) + 100
    inside = corners(5, 90, 140, generator)
    edges = torch.tensor([[0.0, 0.0, 144.0, 96.0], [143.5, 95.5, 144.0, 96.0], [30.0, 30.0, 30.0, 30.0]])
    boxes = [torch.cat([inside, edges]), corners(2, 90, 140, generator)]
    means = box_means(maps, boxes, (96, 144))
    rows = []
    for image, image_boxes in enumerate(boxes):
        for x1, y1, x2, y2 in image_boxes.tolist():
            cells = [
                maps[image, :, row, column].tolist()
                for row in range(min(int(y1 / 16), 5), min(int(y2 / 16), 5) + 1)
                for column in range(min(int(x1 / 16), 8), min(int(x2 / 16), 8) + 1)
            ]
            rows.append([sum(channel) / len(cells) for channel in zip(*cells, strict=True)])
    assert means.dtype == dtype
    torch.testing.assert_close(means, torch.tensor(rows, dtype=dtype), rtol=1e-6, atol=1e-6)


def test_box_means_of_no_box_and_their_gradient() -> None:
    maps = torch.ones(1, 2, 4, 4, requires_grad=True)
    assert box_means(maps, [torch.zeros(0, 4)], (64, 64)).shape == (0, 2)
    box_means(maps, [torch.tensor([[0.0, 0.0, 31.0, 15.0]])], (64, 64)).sum().backward()
    assert maps.grad is not None
    assert maps.grad[0, 0].tolist() == [[0.5, 0.5, 0, 0], [0] * 4, [0] * 4, [0] * 4]


@pytest.mark.parametrize("rows", [3, 1024])
def test_density_equals_loops_over_pairs(rows: int) -> None:
    features = unit(random_features(20, 3, 1))
    values = []
    for one in features.tolist():
        cosines = [sum(a * b for a, b in zip(one, other, strict=True)) for other in features.tolist()]
        values.append(sum(math.exp(-(((1 - cosine) / 0.1) ** 2)) for cosine in cosines))
    kept = dense(features, 0.1, 0.4, rows)
    threshold = sorted(values)[int(0.4 * 19)]
    assert kept.tolist() == [value >= threshold for value in values]
    assert 8 <= int(kept.sum()) <= 13


def slow_pursuit(student: Tensor, teacher: Tensor, atoms: list[int], count: int, alpha: float) -> list[int]:
    left_s, left_t, chosen = student.clone(), teacher.clone(), []
    for _ in range(count):
        best: tuple[float, int, Tensor, Tensor] | None = None
        for atom in atoms:
            p_s, p_t = student[atom], teacher[atom]
            u, v = left_s @ p_s, left_t @ p_t
            w_s = (alpha * (u + v) + u) / (1 + 2 * alpha)
            w_t = (alpha * (u + v) + v) / (1 + 2 * alpha)
            cost = 0.0
            for row in range(len(student)):
                cost += float((p_s * w_s[row] - left_s[row]).square().sum())
                cost += float((p_t * w_t[row] - left_t[row]).square().sum())
                cost += alpha * float((w_s[row] - w_t[row]) ** 2)
            if best is None or cost < best[0]:
                best = cost, atom, w_s, w_t
        assert best is not None
        _, atom, w_s, w_t = best
        left_s = left_s - w_s[:, None] * student[atom]
        left_t = left_t - w_t[:, None] * teacher[atom]
        chosen.append(atom)
    return chosen


def test_pursuit_equals_loops_over_atoms() -> None:
    student, teacher = unit(random_features(15, 4, 2)), unit(random_features(15, 6, 3))
    atoms = torch.tensor([0, 2, 3, 7, 9, 14])
    chosen = matching_pursuit(student, teacher, atoms, 5, 10.0)
    assert chosen.tolist() == slow_pursuit(student, teacher, atoms.tolist(), 5, 10.0)


def test_the_closed_form_of_the_coefficients_is_the_least_cost() -> None:
    u, v, alpha = 0.7, -0.2, 10.0
    w_s, w_t = (alpha * (u + v) + u) / (1 + 2 * alpha), (alpha * (u + v) + v) / (1 + 2 * alpha)

    def cost(a: float, b: float) -> float:
        return a * a - 2 * a * u + b * b - 2 * b * v + alpha * (a - b) ** 2

    best = cost(w_s, w_t)
    assert all(
        cost(w_s + da, w_t + db) > best for da, db in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01), (0.01, 0.01))
    )


def test_one_prototype_of_two_clusters_is_in_the_larger() -> None:
    large = torch.tensor([[1.0, 0.02], [1.0, -0.02], [1.0, 0.0], [1.0, 0.01]])
    small = torch.tensor([[0.0, 1.0], [0.01, 1.0]])
    features = torch.cat([small, large])
    first, second = choose_prototypes(features, 3 * features, 2, quantile=0.0).tolist()
    assert first >= 2 > second  # the second explains what the first left


def test_a_single_instance_and_a_zero_one_are_survived() -> None:
    assert choose_prototypes(torch.ones(1, 3), torch.ones(1, 5), 4).tolist() == [0, 0, 0, 0]
    assert len(choose_prototypes(torch.zeros(3, 3), torch.zeros(3, 5), 2)) == 2
