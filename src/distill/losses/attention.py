"""Attention maps of features: where, and in which channels, a map is large."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def spatial_attention(x: Tensor, temperature: float) -> Tensor:
    """H W softmax over cells of (mean over channels of ``|F|``) / tau; (B, C, H, W) -> (B, H, W), with a mean of 1."""
    magnitude = x.abs().mean(1)
    weights = F.softmax(magnitude.flatten(1) / temperature, dim=1)
    return (weights.shape[1] * weights).view_as(magnitude)


def channel_attention(x: Tensor, temperature: float) -> Tensor:
    """C softmax over channels of (mean over cells of ``|F|``) / tau; (B, C, H, W) -> (B, C), with a mean of 1."""
    return x.shape[1] * F.softmax(x.abs().mean((2, 3)) / temperature, dim=1)


def energy_map(x: Tensor, power: float = 2.0) -> Tensor:
    """(mean over channels of ``|F|^p``) as a vector of length 1 for each image; (B, C, H, W) -> (B, H W)."""
    return F.normalize(x.abs().pow(power).mean(1).flatten(1), dim=1)
