"""RoIAlign over the levels of a neck (He et al. 2017): which level a region is pooled from, and how fast.

On a CPU a region's bins are sums of cells, one row of channels each: that takes a fifth of the time of torchvision's kernel for
512 regions an image, a tenth where maps have their channels last, and gives the same numbers but for the order in which they
are added. torchvision's adds up channel by channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.boxes import box_area
from torchvision.ops.poolers import LevelMapper

from distill.detectors.anchors import choose

KERNELS = ("fast", "torchvision")
BY_CELLS = ("cpu",)
"""Devices on which sums of cells are faster than torchvision's kernel."""


class Levels(LevelMapper):  # type: ignore[misc]
    """The level of a region with the epsilon inside the logarithm: floor(base + log2(side / scale + eps)) + lift."""

    def __init__(self, finest: int, coarsest: int, scale: int, base: int, lift: int, eps: float) -> None:
        super().__init__(finest, coarsest, scale, base, eps)
        self.lift = lift

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        """(R,) int64 indices of levels, 0 the finest."""
        sides = torch.cat([box_area(boxes) for boxes in boxlists]).sqrt()
        levels = torch.floor(self.lvl0 + torch.log2(sides / self.s0 + self.eps)) + self.lift
        indices: Tensor = levels.clamp(self.k_min, self.k_max).long() - self.k_min
        return indices


LEVEL_RULES: dict[str, Any] = {
    "torchvision": LevelMapper,
    "detectron2": lambda finest, coarsest: Levels(finest, coarsest, 224, base=4, lift=0, eps=1e-8),
    "mmdetection": lambda finest, coarsest: Levels(finest, coarsest, 56, base=0, lift=2, eps=1e-6),
}
"""FPN paper, eq. 1, a side of 224 to level 4, by float32 formulas that part where a side is a hair below a bound:
floor(4 + log2(s / 224) + 1e-6), floor(4 + log2(s / 224 + 1e-8)), and floor(log2(s / 56 + 1e-6)) + 2."""


def region_pool(
    strides: Sequence[int],
    output: int,
    sampling: int,
    aligned: bool = False,
    level_rule: str = "torchvision",
    kernel: str = "fast",
) -> MultiScaleRoIAlign:
    """RoIAlign over the first levels of a neck, a region to its level by its size.

    torchvision guesses the scales from the first batch it sees and keeps them, wrong ones for tiny images too. Here
    they are the nominal strides from the start.

    Args:
        strides: of the levels, fine to coarse.
        output: cells a side that a region becomes.
        sampling: points a side of a bin; 0: as many as the region asks for.
        aligned: whether pixel centres lie at half coordinates.
        level_rule: one of `LEVEL_RULES`.
        kernel: ``fast``, by cells where that is faster: on a CPU, with a number of `sampling`; or always ``torchvision``.
    """
    names = [str(level) for level in range(len(strides))]
    if choose("box_roi_align", kernel, KERNELS) == "fast" or aligned:
        pool: Any = RegionPool(names, output, sampling, aligned, kernel == "fast")
    else:
        pool = MultiScaleRoIAlign(names, output, sampling)
    pool.scales = [1.0 / stride for stride in strides]
    rule = LEVEL_RULES[choose("box_level_rule", level_rule, tuple(LEVEL_RULES))]
    pool.map_levels = rule(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    return pool


class RegionPool(MultiScaleRoIAlign):  # type: ignore[misc]
    """torchvision's over several levels, `aligned` or not, by cells where that is `fast`."""

    def __init__(self, names: list[str], output: int, sampling: int, aligned: bool, fast: bool) -> None:
        super().__init__(names, output, sampling)
        self.aligned, self.fast = aligned, fast

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """(R, C, output, output) of the regions (r, 4) of each image in order."""
        maps = [x[name] for name in self.featmap_names]
        if self._by_cells(maps):
            regions, levels = self._regions(boxes)
            grid = Grid(self.output_size[0], self.output_size[1], self.sampling_ratio, self.aligned)
            found: Tensor = _Pooled.apply(grid, self.scales, regions.detach().to(maps[0].dtype), levels, *maps)
            return found
        if not self.aligned:
            pooled: Tensor = super().forward(x, boxes, image_shapes)
            return pooled
        regions, levels = self._regions(boxes)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            rows = torch.where(levels == level)[0]
            pooled[rows] = roi_align(
                features, regions[rows], self.output_size, scale, self.sampling_ratio, aligned=True
            )
        return pooled

    def _by_cells(self, maps: Sequence[Tensor]) -> bool:
        # A traced or compiled program is for others, who know the kernel alone.
        able = {x.dtype for x in maps} in ({torch.float32}, {torch.float64}) and self.sampling_ratio > 0
        exported = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
        return self.fast and able and maps[0].device.type in BY_CELLS and not exported

    def _regions(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(R, 5): the image, x1, y1, x2, y2; and the level of each, (R,)."""
        images = torch.cat([each.new_full((len(each), 1), index) for index, each in enumerate(boxes)])
        return torch.cat([images, torch.cat(list(boxes))], dim=1), self.map_levels(list(boxes))


class Grid(NamedTuple):
    """The sample points of a region: bins, points a side of a bin, and whether pixel centres are at half coordinates."""

    high: int
    wide: int
    points: int
    aligned: bool

    def cells(self, regions: Tensor, scale: float, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rows of a map (B * H * W, C) and their weights, whose sum is a bin: twice (r * high * wide, (2 * points)^2)."""
        x1, y1, x2, y2 = (regions[:, 1:] * scale - (0.5 if self.aligned else 0.0)).unbind(1)
        rows, row_weights = self._axis(y1, y2, self.high, height)
        columns, column_weights = self._axis(x1, x2, self.wide, width)
        rows = (regions[:, 0].int() * height)[:, None, None] + rows
        cells = (rows * width)[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        return cells.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)

    def _axis(self, low: Tensor, high: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
        """Along an axis of `size` cells, those of a bin and their weights, (r, bins, 2 * points): two around each point.

        In the order of torchvision's arithmetic, so that a point falls into the same cells.
        """
        side = high - low if self.aligned else (high - low).clamp(min=1)
        step = (side / bins)[:, None, None]
        each, points = (torch.arange(count, device=low.device) for count in (bins, self.points))
        at = low[:, None, None] + each[:, None] * step + (points + 0.5) * step / self.points
        outside = (at < -1) | (at > size)
        at = at.clamp(min=0)
        before = at.int().clamp(0, size - 1)
        after = (before + 1).clamp(max=size - 1)
        share = torch.where(before == after, 0.0, at - before)  # of the cell after it; at the border there is one cell
        weights = torch.stack([1 - share, share], dim=-1).masked_fill(outside[..., None], 0.0) / self.points
        return torch.stack([before, after], dim=-1).flatten(2), weights.flatten(2)


class _Pooled(torch.autograd.Function):
    """All levels at once, so that regions are put into their order without a copy of all of them for each level."""

    @staticmethod
    def forward(
        ctx: Any, grid: Grid, scales: Sequence[float], regions: Tensor, levels: Tensor, *maps: Tensor
    ) -> Tensor:
        ctx.grid, ctx.scales, ctx.shapes = grid, scales, [each.shape for each in maps]
        ctx.save_for_backward(regions, levels)
        channels = maps[0].shape[1]
        pooled = maps[0].new_zeros(len(regions), channels, grid.high, grid.wide)
        for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
            rows = torch.where(levels == level)[0]
            if not len(rows):
                continue
            cells, weights = grid.cells(regions[rows], scale, *features.shape[2:])
            table = features.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
            bins = F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
            del cells, weights, table  # the next level's are to be made in their place
            pooled[rows] = bins.view(-1, grid.high, grid.wide, channels).permute(0, 3, 1, 2)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The same sums the other way round: of each cell over the bins that it was part of."""
        regions, levels = ctx.saved_tensors
        slopes: list[Tensor | None] = []
        for level, (shape, scale) in enumerate(zip(ctx.shapes, ctx.scales, strict=True)):
            if not ctx.needs_input_grad[len(ctx.needs_input_grad) - len(ctx.shapes) + level]:
                slopes.append(None)
                continue
            images, channels, height, width = shape
            rows = torch.where(levels == level)[0]
            cells, weights = ctx.grid.cells(regions[rows], scale, height, width)
            table = slope[rows].permute(0, 2, 3, 1).reshape(-1, channels)
            ordered, order = torch.sort(cells.flatten(), stable=True)
            places = torch.arange(images * height * width, dtype=torch.int32, device=slope.device)
            starts, parts = torch.searchsorted(ordered, places), order // cells.shape[1]
            sums = F.embedding_bag(parts, table, starts, per_sample_weights=weights.flatten()[order], mode="sum")
            slopes.append(sums.view(images, height, width, channels).permute(0, 3, 1, 2))
        return None, None, None, None, *slopes
