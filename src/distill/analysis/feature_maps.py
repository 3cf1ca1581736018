"""How the necks of student and teacher differ, inside and outside of objects: pure functions on maps and regions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses import masks
from distill.losses.similarity import Dissimilarity
from distill.types import Size, View

PARTS = ("inside", "outside")
MOST_REGIONS = 40
"""Objects per image that become regions of an edge matrix, the first ones."""


class Cells(NamedTuple):
    """Cells of one level, (B, H, W) bool each. Padding belongs to neither part."""

    inside: Tensor
    outside: Tensor


def object_cells(boxes: Sequence[Tensor], image_sizes: Sequence[Size], sizes: Mapping[int, Size]) -> dict[int, Cells]:
    """Split the cells of each level into those inside and outside of objects.

    The cells of an object are those of DeFeat's mask: every object lies on one level, see `masks.ground_truth`.

    Args:
        boxes: ground truth (N, 4) of each image.
        image_sizes: (height, width) of each image without its padding.
        sizes: stride -> (H, W) of the maps, finest first.
    """
    parts = {}
    for stride, member in masks.ground_truth(boxes, sizes).items():
        covered = torch.zeros_like(member, dtype=torch.bool)
        for image, (height, width) in enumerate(image_sizes):
            covered[image, : -(-height // stride), : -(-width // stride)] = True
        inside = (member > 0) & covered
        parts[stride] = Cells(inside, covered & ~inside)
    return parts


def part_means(values: Tensor, cells: Cells) -> Tensor:
    """Sum of values (B, H, W), and number of cells, of each part: (2, 2) float64, a row per part."""
    return torch.stack([torch.stack([values[part].double().sum(), part.sum().double()]) for part in cells])


def channel_distances(student: Tensor, teacher: Tensor, cells: Cells) -> Tensor:
    """Sum over cells of |s - t| for each channel, and the number of cells; two (B, C, H, W) -> (2, C + 1) float64.

    A row per part. Source: figure 8 of DeFeat, arXiv 2103.14475.
    """
    difference = (student.double() - teacher.double()).abs().movedim(1, -1)
    rows = [torch.cat([difference[part].sum(0), part.sum().double()[None]]) for part in cells]
    return torch.stack(rows)


def ssim_map(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over channels of the local structural similarity, two (B, C, H, W) -> (B, H, W) in [-1, 1].

    Planes are rescaled to [0, 1] and compared in windows of 11 x 11 cells, as by ``distill=ssim``.
    """
    dissimilarity = Dissimilarity()(student, teacher)  # the sum over channels of (1 - SSIM) / 2
    return 1 - 2 * dissimilarity / student.shape[1]


def gradient_norms(loss: Tensor, neck: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Stride -> length over channels of the gradient of a loss at each cell of the neck, (B, H, W).

    Source: figure 2 of DeFeat, arXiv 2103.14475, with the detection loss.
    """
    gradients = torch.autograd.grad(loss, list(neck.values()), allow_unused=True)
    return {
        stride: (torch.zeros_like(x) if gradient is None else gradient).norm(dim=1).detach()
        for (stride, x), gradient in zip(neck.items(), gradients, strict=True)
    }


def edge_matrix(features: Tensor) -> Tensor:
    """Cosines between the features of regions, (R, ...) -> (R, R).

    Source: the edges of DSIG's graph, Chen et al., ICCV 2021, arXiv 2109.12862.
    """
    unit = torch.nn.functional.normalize(features.flatten(1).double(), dim=1)
    return unit @ unit.T


def ground_truth_edges(view: View) -> list[Tensor]:
    """Edge matrix (R, R) of each image, whose regions are its first `MOST_REGIONS` objects."""
    boxes = [target.boxes[:MOST_REGIONS] for target in view.batch.targets]
    parts = torch.split(view.roi_features(boxes).detach(), [len(image) for image in boxes])
    return [edge_matrix(part) for part in parts]


class CKA:
    """Linear centered kernel alignment of two sets of features of the same cells, added batch by batch.

    CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|) with centered columns and Frobenius norms: 1 if one set is a rotation and a
    uniform scaling of the other, near 0 if they are unrelated. The numbers of channels may differ. With few cells per
    channel the value is too high.

    Source: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv
    1905.00414.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, ...] | None = None

    def add(self, student: Tensor, teacher: Tensor, part: Tensor) -> None:
        """Add the cells of a part (B, H, W) of two maps (B, C, H, W)."""
        x, y = (maps.detach().double().movedim(1, -1)[part] for maps in (student, teacher))
        self.count += len(x)
        sums = x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x
        self._sums = sums if self._sums is None else tuple(a + b for a, b in zip(self._sums, sums, strict=True))

    def value(self) -> float:
        """CKA in [0, 1]; NaN if the features of one side do not vary."""
        if self._sums is None or self.count < 2:
            return math.nan
        sum_x, sum_y, xx, yy, yx = self._sums
        xx, yy, yx = (
            product - torch.outer(left, right) / self.count
            for product, left, right in ((xx, sum_x, sum_x), (yy, sum_y, sum_y), (yx, sum_y, sum_x))
        )
        scale = float(xx.norm() * yy.norm())
        return float(yx.norm() ** 2) / scale if scale > 0 else math.nan
