"""The resize of `imaging.resizing` in operations that every format can express, with the same result to the bit.

torch resizes uint8 images on x86 CPUs with integer weights, and rounds after each axis. A resize operation of another
program rounds differently: where sides have simple ratios, such as 2 to 3, one pixel in ten would differ by a gray
level. Products of the quantized weights and pixels are whole numbers below 2^24, which float32 holds exactly. So float
arithmetic gives torch's integers.

Source: torch, aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_index_ranges_int16_weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def resized_sides(sides: Tensor, min_size: int, max_size: int) -> tuple[Tensor, Tensor]:
    """Height and width after the resize, as `imaging.resizing.resized_size` computes them, from (2,) int64.

    The arithmetic is float64, as in Python: float32 would round a side down by one pixel too often.
    """
    shorter, longer = sides.min().double(), sides.max().double()
    scale = torch.minimum(_constant(min_size) / shorter, _constant(max_size) / longer)
    height, width = (sides.double() * scale).floor().clamp(min=1).to(torch.int64).unbind()
    return height, width


def resize_pixels(image: Tensor, height: Tensor, width: Tensor, antialias: bool) -> Tensor:
    """Resize pixels (1, 3, H, W), whole numbers from 0 to 255 in float32: bilinear, the horizontal axis first.

    Without antialiasing the result equals that of torch on an x86 CPU. With it, one value in a thousand may differ by
    one: the weights are not exact in float32.
    """
    rows, columns = torch._shape_as_tensor(image)[2:].unbind()
    if antialias:
        weights, precision = _filters(columns, width)
        wide = _rounded(image @ weights.T, precision)
        weights, precision = _filters(rows, height)
        return _rounded(weights @ wide, precision)
    return _interpolated(_interpolated(image, columns, width, 3), rows, height, 2)


def _interpolated(image: Tensor, old: Tensor, new: Tensor, axis: int) -> Tensor:
    """Resize one axis without antialiasing: each new pixel is a weighted mean of two neighbors."""
    length: Any = new
    source = ((torch.arange(length, dtype=torch.float64) + 0.5) * _ratio(old, new) - 0.5).clamp(min=0)
    before = torch.minimum(source.floor(), (old - 1).double())
    share = torch.where(before < (old - 1).double(), source - before, torch.zeros_like(source))
    precision = _precision(torch.maximum(share, 1 - share))
    first, second = (_quantized(weight, precision) for weight in (1 - share, share))
    index = before.to(torch.int64)
    if axis == 2:
        first, second = first[:, None], second[:, None]
    neighbors = torch.minimum(index + 1, old - 1)
    return _rounded(image.index_select(axis, index) * first + image.index_select(axis, neighbors) * second, precision)


def _filters(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized weights (new, old) of a resize with antialiasing, and their precision.

    A new pixel is a mean of old ones, weighted by a triangle whose width grows with the reduction.
    """
    length: Any = new
    count: Any = old
    scale = _ratio(old, new)
    center = (torch.arange(length, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(count, dtype=torch.float64)[None] + 0.5 - center[:, None]) / scale.clamp(min=1)
    weights = (1 - distance.abs()).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    precision = _precision(weights)
    return _quantized(weights, precision), precision


def _precision(weights: Tensor) -> Tensor:
    """The largest exponent p with all weights * 2^p below 2^15, at most 22."""
    return torch.floor(torch.log2(_constant(2.0**15 - 0.5) / weights.max())).clamp(max=22)


def _quantized(weights: Tensor, precision: Tensor) -> Tensor:
    return (weights * _power(precision) + 0.5).floor().to(torch.float32)


def _rounded(sums: Tensor, precision: Tensor) -> Tensor:
    scale = _power(precision).to(torch.float32)
    return ((sums + scale / 2) / scale).floor()


def _power(exponent: Tensor) -> Tensor:
    """2^exponent. ONNX has no exp2."""
    return torch.pow(_constant(2), exponent)


def _ratio(old: Tensor, new: Tensor) -> Tensor:
    return old.reshape(1).double() / new.reshape(1).double()


def _constant(value: float) -> Tensor:
    """A number as (1,) float64. The exporter would turn a scalar into float32."""
    return torch.tensor([value], dtype=torch.float64)
