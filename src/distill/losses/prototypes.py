"""Prototypes of Global Knowledge: a few instances of a class that span the feature spaces of both models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.types import Size


def box_means(maps: Tensor, boxes: Sequence[Tensor], image: Size) -> Tensor:
    """Mean feature of the cells under each box, for the boxes of all images in order.

    Corners are scaled by map / padded image and truncated. Cells from the first to the last corner count, both
    inclusive.

    Args:
        maps: (B, C, H, W).
        boxes: (r, 4) per image, xyxy in pixels of the padded image.
        image: (height, width) of the padded image.

    Returns:
        (R, C), attached to `maps`.
    """
    height, width = maps.shape[-2:]
    scale = torch.tensor([width / image[1], height / image[0]] * 2, device=maps.device)
    means = []
    for features, corners in zip(maps, boxes, strict=True):
        cells = (corners * scale).long().clamp(min=0)
        left, top = cells[:, 0].clamp(max=width - 1), cells[:, 1].clamp(max=height - 1)
        right, bottom = cells[:, 2].clamp(max=width - 1) + 1, cells[:, 3].clamp(max=height - 1) + 1
        # The sum over any rectangle is a combination of four cumulative sums; in float64, because they cancel.
        sums = F.pad(features.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
        total = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
        means.append((total / ((right - left) * (bottom - top)).clamp(min=1)).T.to(maps.dtype))
    return torch.cat(means)


def dense(features: Tensor, bandwidth: float, quantile: float, rows: int = 1024) -> Tensor:
    """Which of N unit vectors (N, D) have a density at or above the quantile of all densities.

    density_i = sum_j exp(-((1 - cos_ij) / bandwidth)^2)
    """
    parts = [torch.exp(-(((1 - part @ features.T) / bandwidth) ** 2)).sum(1) for part in torch.split(features, rows)]
    density = torch.cat(parts)
    # Quantile by sorting: torch.quantile refuses more than 2^24 values.
    return density >= density.sort().values[int(quantile * (len(density) - 1))]


def matching_pursuit(student: Tensor, teacher: Tensor, atoms: Tensor, count: int, alpha: float) -> Tensor:
    """Choose `count` atoms greedily that explain all instances in both spaces with similar coefficients.

    With residuals R_s, R_t, and for atom k u = p_s,k . R_s, v = p_t,k . R_t::

        w_s = (alpha (u + v) + u) / (1 + 2 alpha)         w_t = (alpha (u + v) + v) / (1 + 2 alpha)
        cost_k = |p_s,k w_s - R_s|^2 + |p_t,k w_t - R_t|^2 + alpha |w_s - w_t|^2

    Each step takes the atom of the least cost and subtracts its part from both residuals. An atom may be taken again.

    Args:
        student, teacher: unit vectors (N, D) of the same instances in both spaces.
        atoms: (K,) indices of the instances that may be chosen.
        count: number of steps.
        alpha: weight of the difference of the coefficients.

    Returns:
        (count,) indices of instances.
    """
    student_atoms, teacher_atoms = student[atoms], teacher[atoms]
    residual_s, residual_t, chosen = student, teacher, []
    norm_s, norm_t = student_atoms.square().sum(1), teacher_atoms.square().sum(1)  # 1, or 0 for a feature that is zero
    for _ in range(count):
        u, v = residual_s @ student_atoms.T, residual_t @ teacher_atoms.T
        w_s, w_t = ((alpha * (u + v) + dot) / (1 + 2 * alpha) for dot in (u, v))
        # The expanded squares, without |R|^2, which is the same for all atoms: no (K, D, N) tensor is needed.
        costs = norm_s * w_s**2 - 2 * w_s * u + norm_t * w_t**2 - 2 * w_t * v + alpha * (w_s - w_t) ** 2
        best = costs.sum(0).argmin()
        residual_s = residual_s - w_s[:, best, None] * student_atoms[best]
        residual_t = residual_t - w_t[:, best, None] * teacher_atoms[best]
        chosen.append(atoms[best])
    return torch.stack(chosen)


def choose_prototypes(
    student: Tensor, teacher: Tensor, count: int, alpha: float = 10.0, bandwidth: float = 0.1, quantile: float = 0.4
) -> Tensor:
    """(count,) indices of the prototypes among N >= 1 instances, from features (N, D) of any scale in both spaces."""
    student, teacher = (F.normalize(features.double(), dim=1) for features in (student, teacher))
    crowded = dense(student, bandwidth, quantile) & dense(teacher, bandwidth, quantile)
    atoms = crowded.nonzero()[:, 0] if crowded.any() else torch.arange(len(student), device=student.device)
    return matching_pursuit(student, teacher, atoms, count, alpha)
