"""Standardization of feature maps: each channel with mean 0 and standard deviation 1 over the batch and all cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill import distributed
from distill.precision import upcast

EPSILON = 1e-6
"""Added to a standard deviation, as the released codes of PKD and CrossKD do."""


def channel_moments(maps: Sequence[Tensor], everywhere: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased standard deviation of each channel of maps (B, C, H, W), (1, C, 1, 1) each.

    Args:
        maps: float32 or float64.
        everywhere: take the statistics over the batches of all processes, with their gradient. Every process must then
            call this function, with maps of as many levels and channels.
    """
    channels = [x.shape[1] for x in maps]
    counts = torch.stack([torch.full_like(x[0, 0, 0, 0], x.numel() / x.shape[1]) for x in maps]).detach()
    if everywhere:
        counts, _ = distributed.sum_over_ranks(counts)
    sums = torch.cat([x.sum((0, 2, 3)) for x in maps])
    sums = distributed.sum_with_gradient(sums) if everywhere else sums
    means = [part / count for part, count in zip(torch.split(sums, channels), counts, strict=True)]
    squares = torch.cat(
        [(x - mean[:, None, None]).square().sum((0, 2, 3)) for x, mean in zip(maps, means, strict=True)]
    )
    squares = distributed.sum_with_gradient(squares) if everywhere else squares
    moments = []
    for mean, square, count in zip(means, torch.split(squares, channels), counts, strict=True):
        variance = square / (count - 1).clamp(min=1)
        # The root has an infinite slope at 0, the variance of a constant channel or of a single cell.
        deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
        moments.append((mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)))
    return moments


def standardized(x: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    """(x - mean) / (standard deviation + 1e-6), with moments of :func:`channel_moments`."""
    mean, deviation = moments
    return (x - mean) / (deviation + EPSILON)


class BatchNorm(nn.Module):
    """Batch norm with the statistics of the current batch in every step; it keeps no running statistics.

    Weight and bias start at 0, so the untrained layer returns 0.

    Args:
        channels: of the maps (B, C, H, W).
        everywhere: take the statistics over the batches of all processes.
        epsilon: added to the variance.
    """

    def __init__(self, channels: int, everywhere: bool = False, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
        self.everywhere, self.epsilon = everywhere, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in float32 at least."""
        x = upcast(x)
        ((mean, deviation),) = channel_moments([x], self.everywhere)
        count = x.new_full((), x.numel() / x.shape[1])
        if self.everywhere:
            count, _ = distributed.sum_over_ranks(count)
        variance = deviation.square() * ((count - 1) / count)  # of the population
        scale = self.weight.view(1, -1, 1, 1) / (variance + self.epsilon).sqrt()
        return (x - mean) * scale + self.bias.view(1, -1, 1, 1)
