"""Masks: the weight of each cell of a feature map, from boxes and map sizes. Pure functions, vectorized over boxes.

Every mask is a dict stride -> weights (B, H, W) in [0, 1], float32, 1 for "object". Boxes are one (N, 4) tensor per
image, xyxy in pixels of the resized image: ground truth, proposals or predictions. The maps cover the padded batch, so
padding is background. Nothing here waits for the device.

A box lies on exactly one of the given levels (:func:`assign_levels`). For a mask with every box on one map, pass only
that map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from distill.types import DistillError, Size, View, require

KINDS = ("ground_truth", "fine_grained", "fine_grained_all_levels", "gaussian", "random", "none")
Masks = dict[int, Tensor]


@dataclass(frozen=True)
class Mask:
    """A kind of mask with its options. A call returns the mask of the ground truth of a View's batch.

    Args:
        kind: ``ground_truth``, ``fine_grained``, ``fine_grained_all_levels``, ``gaussian``, ``random`` or ``none``: the
            functions below.
        scale: of the level rule, in pixels.
        threshold: of the fine-grained kinds, a fraction of the best IoU.

    Raises:
        DistillError: unknown kind, or a value out of range.
    """

    kind: str = "ground_truth"
    scale: float = 56.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DistillError(f"mask.kind: expected one of {', '.join(KINDS)}, got '{self.kind}'")
        if not self.scale > 0:
            raise DistillError(f"mask.scale: expected pixels, above 0, got {self.scale}")
        if not 0 <= self.threshold < 1:
            raise DistillError(
                f"mask.threshold: expected a fraction of the best IoU, 0 to below 1, got {self.threshold}"
            )

    def __call__(self, view: View, sizes: Mapping[int, Size], seeds: Sequence[int] = ()) -> Masks:
        """Masks for maps of `sizes` (stride -> (H, W), finest first). `seeds`, one per image, are for ``random``."""
        if not self.reads_boxes:
            return none(len(view.batch), sizes, view.batch.images.device)
        return self.around_boxes([target.boxes for target in view.batch.targets], None, view, sizes, seeds)

    @property
    def reads_boxes(self) -> bool:
        """Whether the mask depends on boxes."""
        return self.kind != "none"

    def around_boxes(
        self,
        boxes: Sequence[Tensor],
        values: Sequence[Tensor] | None,
        view: View,
        sizes: Mapping[int, Size],
        seeds: Sequence[int] = (),
    ) -> Masks:
        """Masks of given boxes (N, 4) per image, with values (N,) that multiply the cells of each box.

        Where boxes overlap, the largest value counts. None: all values are 1. The kind ``none`` is 1 everywhere.
        """
        if self.kind == "fine_grained":
            return fine_grained(boxes, _anchors(view), sizes, self.threshold, self.scale, values)
        if self.kind == "fine_grained_all_levels":
            return fine_grained_all_levels(boxes, _anchors(view), sizes, self.threshold, values)
        if self.kind == "gaussian":
            return gaussian(boxes, sizes, self.scale, values)
        if self.kind == "none":
            return none(len(boxes), sizes, view.batch.images.device)
        mask = ground_truth(boxes, sizes, self.scale) if values is None else weighted(boxes, values, sizes, self.scale)
        return random(mask, seeds) if self.kind == "random" else mask

    def on_stages(self, view: View, sizes: Mapping[int, Size], seeds: Sequence[int] = ()) -> Masks:
        """Masks of backbone stages: one of all boxes at the neck's finest stride, resized to all stages (nearest)."""
        require(view.spec, "neck", "mask")
        finest = min(view.spec.neck)
        mask = self(view, {finest: map_size(view.neck[finest])}, seeds)[finest][:, None]
        return {stage: F.interpolate(mask, size)[:, 0] for stage, size in sizes.items()}


def _anchors(view: View) -> Mapping[int, Tensor]:
    """The anchors of the fine-grained kinds, stride -> (H*W*A, 4)."""
    return pseudo_anchors(view.anchors) if "points" in view.spec.outputs else view.anchors


def map_size(x: Tensor) -> Size:
    """(height, width) of a map."""
    return x.shape[-2], x.shape[-1]


def assign_levels(boxes: Tensor, levels: int, scale: float = 56.0) -> Tensor:
    """Level, from 0 to `levels` - 1, of boxes (..., 4): clamp(floor(log2(s / scale + 1e-6)), 0, levels - 1).

    s = sqrt((x2 - x1 + 1)(y2 - y1 + 1)), with the "+1" of DeFeat's and FGFI's code.
    """
    width, height = (boxes[..., 2:] - boxes[..., :2] + 1).unbind(-1)
    ratio = (width * height).sqrt() / scale + 1e-6
    # The number of powers of two up to the ratio is the floor of its logarithm, without a rounding error.
    return sum(((ratio >= 2.0**level).long() for level in range(1, levels)), start=torch.zeros_like(ratio).long())


def ground_truth(boxes: Sequence[Tensor], sizes: Mapping[int, Size], scale: float = 56.0) -> Masks:
    """1 on the cells that boxes cover: corners truncated, right and bottom exclusive (DeFeat, released code).

    A box thinner than a cell in either direction sets a single cell.
    """
    masks = {}
    for stride, (rows, columns) in _spans(boxes, sizes, scale).items():
        # A cell is covered where the sum over boxes of (row indicator) x (column indicator) is positive.
        count = torch.einsum("bnh,bnw->bhw", rows.inside.float(), columns.inside.float())
        masks[stride] = (count > 0).float()
    return masks


def weighted(
    boxes: Sequence[Tensor], values: Sequence[Tensor], sizes: Mapping[int, Size], scale: float = 56.0
) -> Masks:
    """The value of each box (N,) on the cells of `ground_truth`, the largest where boxes overlap."""
    padded = _pad_values(values)
    masks = {}
    for stride, (rows, columns) in _spans(boxes, sizes, scale).items():
        images = zip(rows.inside * padded[..., None], columns.inside, strict=True)
        masks[stride] = torch.stack([(row[:, :, None] * column[:, None]).amax(0) for row, column in images])
    return masks


def gaussian(
    boxes: Sequence[Tensor],
    sizes: Mapping[int, Size],
    scale: float = 56.0,
    values: Sequence[Tensor] | None = None,
) -> Masks:
    """A Gaussian per box, the largest value where boxes overlap (TADF, Sun et al. 2020, as in DeFeat's repository).

    On the truncated cells of the box, x = 0..w-1 and y = 0..h-1: exp(-((x - w/2) / (w/2))^2 / 2) exp(-((y - h/2) /
    (h/2))^2 / 2). Its center is half a cell too far right and down. A box thinner than a cell in either direction sets
    a single cell to 1. `values` (N,) per image multiply the Gaussians.
    """
    masks = {}
    for stride, (rows, columns) in _spans(boxes, sizes, scale).items():
        heights = rows.gaussian if values is None else rows.gaussian * _pad_values(values)[..., None]
        images = zip(heights, columns.gaussian, strict=True)
        # One image at a time, because (N, H, W) is large.
        masks[stride] = torch.stack([(row[:, :, None] * column[:, None]).amax(0) for row, column in images])
    return masks


def fine_grained(
    boxes: Sequence[Tensor],
    anchors: Mapping[int, Tensor],
    sizes: Mapping[int, Size],
    threshold: float = 0.5,
    scale: float = 56.0,
    values: Sequence[Tensor] | None = None,
) -> Masks:
    """1 where any anchor of the cell has an IoU above `threshold` times the best IoU of the box on its level.

    Source: FGFI, Wang et al., CVPR 2019, with the level rule of DeFeat's rerun. IoU is torchvision's, without the "+1"
    of the original, so border cells can differ from it.

    Args:
        boxes: (N, 4) per image.
        anchors: stride -> (H*W*A, 4), rows in the order (row, column, anchor).
        sizes: stride -> (H, W).
        threshold: the paper's psi. At 1 no cell is set, because the comparison is strict.
        scale: of the level rule, in pixels.
        values: (N,) per image, the value of a box's cells, the largest where boxes share a cell; None for 1.
    """
    padded, valid = _pad(boxes)
    level, padded_values = assign_levels(padded, len(sizes), scale), valid if values is None else _pad_values(values)
    masks = {}
    for index, (stride, (height, width)) in enumerate(sizes.items()):
        images = zip(padded, valid & (level == index), padded_values, strict=True)
        cells = [_near_best(box_iou(anchors[stride], image) * real, threshold, value) for image, real, value in images]
        masks[stride] = torch.stack([mask.view(height, width, -1).amax(-1).float() for mask in cells])
    return masks


def pseudo_anchors(points: Mapping[int, Tensor], side: float = 8.0) -> dict[int, Tensor]:
    """Stride -> squares of `side` strides with the same centers, for a detector whose anchors are one stride wide.

    FGFI has no rule for detectors without anchors; 8 strides is the choice of LD's rerun (Zheng et al., CVPR 2022).
    """
    squares = {}
    for stride, boxes in points.items():
        center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * (side / 2)
        squares[stride] = torch.cat([center - half, center + half], dim=1)
    return squares


def _near_best(iou: Tensor, threshold: float, values: Tensor) -> Tensor:
    """(anchors, N), (N,) -> (anchors,): the largest value of boxes whose best IoU the anchor nearly reaches, else 0."""
    return ((iou > threshold * iou.amax(0)) * values).amax(-1)


def fine_grained_all_levels(
    boxes: Sequence[Tensor],
    anchors: Mapping[int, Tensor],
    sizes: Mapping[int, Size],
    threshold: float = 0.5,
    values: Sequence[Tensor] | None = None,
) -> Masks:
    """:func:`fine_grained` without a level rule: the best IoU of a box is that over the anchors of all levels of
    `sizes`.

    Source: the rerun of FGFI in Zheng et al., "Localization Distillation", CVPR 2022 (there with one anchor per cell).
    """
    padded, valid = _pad(boxes)
    flat = torch.cat([anchors[stride] for stride in sizes])
    images = zip(padded, valid, valid if values is None else _pad_values(values), strict=True)
    cells = torch.stack([_near_best(box_iou(flat, image) * real, threshold, value) for image, real, value in images])
    levels = torch.split(cells, [len(anchors[stride]) for stride in sizes], dim=1)
    return {
        stride: level.view(len(level), height, width, -1).amax(-1).float()
        for (stride, (height, width)), level in zip(sizes.items(), levels, strict=True)
    }


def inverse_areas(boxes: Sequence[Tensor], images: Sequence[Size], cells: Size) -> Tensor:
    """The largest 1 / (number of its cells) of the boxes that cover a cell, 0 without a box: (B, H, W).

    A box covers the cells from floor(x1 W / w) to ceil(x2 W / w), both inclusive, of an image of w pixels and a map of
    W cells; rows likewise. The number of cells is not clipped to the map. Source: the released code of FGD (Yang et
    al., CVPR 2022).

    Args:
        boxes: (N, 4) per image.
        images: (h, w) of each image in pixels.
        cells: (H, W) of the map.
    """
    padded, valid = _pad(boxes)
    height, width = cells
    pixels = torch.tensor([(w, h, w, h) for h, w in images], dtype=padded.dtype).to(padded.device, non_blocking=True)
    scale = torch.tensor([width, height, width, height], dtype=padded.dtype).to(padded.device, non_blocking=True)
    corners = padded / pixels[:, None] * scale
    low, high = corners[..., :2].floor(), corners[..., 2:].ceil()
    values = valid / (high - low + 1).prod(-1)
    rows, columns = (torch.arange(count, device=padded.device) for count in cells)
    in_columns = (columns >= low[..., :1]) & (columns <= high[..., :1])
    in_rows = (rows >= low[..., 1:]) & (rows <= high[..., 1:])
    # One image at a time, because (N, H, W) is large.
    images_of = zip(in_rows * values[..., None], in_columns, strict=True)
    return torch.stack([(row[:, :, None] * column[:, None]).amax(0) for row, column in images_of])


def random(like: Masks, seeds: Sequence[int]) -> Masks:
    """The weights of `like`, shuffled within each image and level, at places drawn from the image's own seed.

    Only the places differ from `like`, not the number of cells or their weights.
    """
    first = next(iter(like.values()))
    generators = [torch.Generator(first.device).manual_seed(seed) for seed in seeds]
    return {stride: torch.stack([*map(_shuffled, mask, generators)]) for stride, mask in like.items()}


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    draw = torch.rand(mask.numel(), generator=generator, device=mask.device)
    return mask.flatten().sort(descending=True).values[draw.argsort()].view_as(mask)


def none(batch: int, sizes: Mapping[int, Size], device: torch.device | None = None) -> Masks:
    """1 everywhere."""
    return {stride: torch.ones(batch, *size, device=device) for stride, size in sizes.items()}


class _Span:
    """The cells (B, N, cells) that boxes cover along one axis of a map, from `start` to `end` (exclusive)."""

    def __init__(self, start: Tensor, end: Tensor, single: Tensor, valid: Tensor, cells: int) -> None:
        self._single = single[..., None]
        # A box at the far border may truncate to a cell beyond the last one.
        self._start = start.clamp(max=cells - 1)[..., None]
        self._end = torch.where(self._single, self._start + 1, end[..., None])
        self._cell = torch.arange(cells, device=start.device)
        self.inside = (self._cell >= self._start) & (self._cell < self._end) & valid[..., None]

    @property
    def gaussian(self) -> Tensor:
        half = (self._end - self._start).clamp(min=1) / 2
        values = torch.exp(-0.5 * ((self._cell - self._start - half) / half) ** 2)
        return torch.where(self._single, 1.0, values) * self.inside


def _spans(boxes: Sequence[Tensor], sizes: Mapping[int, Size], scale: float) -> dict[int, tuple[_Span, _Span]]:
    """Stride -> rows and columns of the boxes that lie on that level."""
    padded, valid = _pad(boxes)
    level = assign_levels(padded, len(sizes), scale)
    spans = {}
    for index, (stride, (height, width)) in enumerate(sizes.items()):
        left, top, right, bottom = (padded / stride).trunc().clamp(min=0).unbind(-1)
        right, bottom = right.clamp(max=width), bottom.clamp(max=height)
        single, here = (left >= right) | (top >= bottom), valid & (level == index)
        spans[stride] = _Span(top, bottom, single, here, height), _Span(left, right, single, here, width)
    return spans


def _pad_values(values: Sequence[Tensor]) -> Tensor:
    """Values of boxes, padded to the (B, N) of `_pad`."""
    return pad_sequence([F.pad(image_values, (0, 1)) for image_values in values], batch_first=True)


def _pad(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N, 4) float32, and which rows are boxes (B, N). N is at least 1, so that maxima over boxes exist."""
    # A fifth column marks the boxes: counts from the host would have to be sent to the device.
    marked = [F.pad(F.pad(image_boxes.float(), (0, 1), value=1.0), (0, 0, 0, 1)) for image_boxes in boxes]
    padded = pad_sequence(marked, batch_first=True)
    return padded[..., :4], padded[..., 4] > 0
