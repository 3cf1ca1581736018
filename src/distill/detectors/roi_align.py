"""RoIAlign over the levels of a neck (He et al. 2017), with a choice of level rules and a faster CPU version.

On a CPU, each bin of a region is computed as a weighted sum of map cells, for all channels at once. torchvision's
kernel sums channel by channel. For 512 regions per image the CPU version takes one fifth of the kernel's time, and one
tenth if the maps are channels last. The results are equal except for the order of the additions.
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
"""Values of the option `box_roi_align`."""
BY_CELLS = ("cpu",)
"""Device types on which sums of cells are faster than torchvision's kernel."""


class Levels(LevelMapper):  # type: ignore[misc]
    """LevelMapper with the epsilon inside the logarithm: floor(base + log2(side / scale + eps)) + lift."""

    def __init__(self, finest: int, coarsest: int, scale: int, base: int, lift: int, eps: float) -> None:
        super().__init__(finest, coarsest, scale, base, eps)
        self.lift = lift

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        """Return the level index (R,) int64 of each region; 0 is the finest level."""
        sides = torch.cat([box_area(boxes) for boxes in boxlists]).sqrt()
        levels = torch.floor(self.lvl0 + torch.log2(sides / self.s0 + self.eps)) + self.lift
        indices: Tensor = levels.clamp(self.k_min, self.k_max).long() - self.k_min
        return indices


LEVEL_RULES: dict[str, Any] = {
    "torchvision": LevelMapper,
    "detectron2": lambda finest, coarsest: Levels(finest, coarsest, 224, base=4, lift=0, eps=1e-8),
    "mmdetection": lambda finest, coarsest: Levels(finest, coarsest, 56, base=0, lift=2, eps=1e-6),
}
"""Name of a level rule -> constructor, given the finest and the coarsest level.

All rules implement equation 1 of the FPN paper (Lin et al. 2017): a region with side 224 belongs to level 4. Their
float32 formulas differ only for a side s slightly below a bound. In the order above: floor(4 + log2(s / 224) + 1e-6),
floor(4 + log2(s / 224 + 1e-8)), and floor(log2(s / 56 + 1e-6)) + 2.
"""


def region_pool(
    strides: Sequence[int],
    output: int,
    sampling: int,
    aligned: bool = False,
    level_rule: str = "torchvision",
    kernel: str = "fast",
) -> MultiScaleRoIAlign:
    """Build a RoIAlign over the first levels of a neck. The size of a region decides its level.

    torchvision infers the scales from its first batch and keeps them. For tiny images the inferred scales are wrong.
    This function sets the scales to those of the nominal strides.

    Args:
        strides: strides of the levels, fine to coarse.
        output: side of the pooled features in cells.
        sampling: sample points per side of a bin. 0 adapts the number to the size of the region.
        aligned: whether pixel centers lie at half coordinates.
        level_rule: a name in `LEVEL_RULES`.
        kernel: ``fast`` uses sums of cells where they are faster: on a CPU, with a `sampling` above 0. ``torchvision``
            always uses torchvision's kernel.

    Raises:
        DistillError: `level_rule` or `kernel` has another value.
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
    """torchvision's MultiScaleRoIAlign with the options `aligned` and `fast`, see `region_pool`."""

    def __init__(self, names: list[str], output: int, sampling: int, aligned: bool, fast: bool) -> None:
        super().__init__(names, output, sampling)
        self.aligned, self.fast = aligned, fast

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Pool the features (R, C, output, output) of the regions (r, 4) of each image, in order."""
        maps = [x[name] for name in self.featmap_names]
        if self._by_cells(maps):
            regions, levels = self._regions(boxes)
            grid = Grid(self.output_size[0], self.output_size[1], self.sampling_ratio, self.aligned)
            features: Tensor = _Pooled.apply(grid, self.scales, regions.detach().to(maps[0].dtype), levels, *maps)
            return features
        if not self.aligned:
            pooled: Tensor = super().forward(x, boxes, image_shapes)
            return pooled
        regions, levels = self._regions(boxes)
        pooled = maps[0].new_zeros(regions.shape[0], maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            rows = torch.where(levels == level)[0]
            pooled[rows] = roi_align(
                features, regions[rows], self.output_size, scale, self.sampling_ratio, aligned=True
            )
        return pooled

    def _by_cells(self, maps: Sequence[Tensor]) -> bool:
        # Programs that load a traced or compiled network know only torchvision's kernel.
        able = {x.dtype for x in maps} in ({torch.float32}, {torch.float64}) and self.sampling_ratio > 0
        exported = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
        return self.fast and able and maps[0].device.type in BY_CELLS and not exported

    def _regions(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Regions (R, 5) as (image index, x1, y1, x2, y2), and the level of each region (R,)."""
        images = torch.cat(
            [image_boxes.new_full((image_boxes.shape[0], 1), index) for index, image_boxes in enumerate(boxes)]
        )
        return torch.cat([images, torch.cat(list(boxes))], dim=1), self.map_levels(list(boxes))


class Grid(NamedTuple):
    """The sample points of a region."""

    high: int
    """Number of bins along the height."""
    wide: int
    """Number of bins along the width."""
    points: int
    """Sample points per side of a bin."""
    aligned: bool
    """Whether pixel centers lie at half coordinates."""

    def cells(self, regions: Tensor, scale: float, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the cells and weights whose weighted sums are the bins of regions (r, 5).

        Returns:
            Row indices into a map of shape (B * H * W, C), and the weights, each (r * high * wide, (2 * points)^2).
        """
        x1, y1, x2, y2 = (regions[:, 1:] * scale - (0.5 if self.aligned else 0.0)).unbind(1)
        rows, row_weights = self._axis(y1, y2, self.high, height)
        columns, column_weights = self._axis(x1, x2, self.wide, width)
        rows = (regions[:, 0].int() * height)[:, None, None] + rows
        cells = (rows * width)[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        return cells.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)

    def _axis(self, low: Tensor, high: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
        """Cell indices and weights of each bin along an axis of `size` cells, each (r, bins, 2 * points).

        Each sample point has two neighboring cells. The order of operations is torchvision's, so that rounding selects
        the same cells.
        """
        side = high - low if self.aligned else (high - low).clamp(min=1)
        step = (side / bins)[:, None, None]
        bin_indices, points = (torch.arange(count, device=low.device) for count in (bins, self.points))
        at = low[:, None, None] + bin_indices[:, None] * step + (points + 0.5) * step / self.points
        outside = (at < -1) | (at > size)
        at = at.clamp(min=0)
        before = at.int().clamp(0, size - 1)
        after = (before + 1).clamp(max=size - 1)
        share = torch.where(before == after, 0.0, at - before)  # of `after`; 0 at the border, where both are one cell
        weights = torch.stack([1 - share, share], dim=-1).masked_fill(outside[..., None], 0.0) / self.points
        return torch.stack([before, after], dim=-1).flatten(2), weights.flatten(2)


class _Pooled(torch.autograd.Function):
    """RoIAlign of all levels in one autograd function.

    Separate operations for each level would copy the features of all regions once per level.
    """

    @staticmethod
    def forward(
        ctx: Any, grid: Grid, scales: Sequence[float], regions: Tensor, levels: Tensor, *maps: Tensor
    ) -> Tensor:
        ctx.grid, ctx.scales, ctx.shapes = grid, scales, [level.shape for level in maps]
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
            del cells, weights, table  # free the memory for the next level
            pooled[rows] = bins.view(-1, grid.high, grid.wide, channels).permute(0, 3, 1, 2)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of each cell: the weighted sum over the gradients of all bins that use the cell."""
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
