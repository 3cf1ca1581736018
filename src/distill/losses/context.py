"""Global context of a feature map: the block of GCNet (Cao et al., ICCV workshops 2019, arXiv 1904.11492)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GlobalContext(nn.Module):
    """Add a summary of the whole map to every cell: F + W_2 relu(LN(W_1 ctx)), with ctx = sum_hw softmax_hw(w F) F.

    The last convolution starts at 0, so the block starts as the identity. The convolution of the softmax starts from a
    normal distribution with variance 2 / C (Kaiming, fan-in), the first of the others from torch's default. The softmax
    has no bias, because a bias would not change it.

    Args:
        channels: of the maps (B, C, H, W).
        reduction: the hidden layer has C / reduction channels, at least 1.
        seed: of the start values.
    """

    def __init__(self, channels: int, reduction: int = 2, seed: int = 0) -> None:
        super().__init__()
        hidden, source = max(1, channels // reduction), torch.Generator().manual_seed(seed)
        # Layers built on the meta device draw no start values from the global stream.
        self.mask = nn.Conv2d(channels, 1, 1, bias=False, device="meta").to_empty(device="cpu")
        self.reduce = nn.Conv2d(channels, hidden, 1, device="meta").to_empty(device="cpu")
        self.norm = nn.LayerNorm([hidden, 1, 1])
        self.expand = nn.Conv2d(hidden, channels, 1, device="meta").to_empty(device="cpu")
        bound = 1 / math.sqrt(channels)
        with torch.no_grad():
            self.mask.weight.normal_(0, math.sqrt(2 / channels), generator=source)
            self.reduce.weight.uniform_(-bound, bound, generator=source)
            assert self.reduce.bias is not None
            assert self.expand.bias is not None
            self.reduce.bias.uniform_(-bound, bound, generator=source)
            self.expand.weight.zero_()
            self.expand.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        weights = F.softmax(self.mask(x).flatten(2), dim=2).to(x.dtype)  # (B, 1, HW)
        context = (x.flatten(2) * weights).sum(2)[:, :, None, None]
        added: Tensor = self.expand(F.relu(self.norm(self.reduce(context))))
        return x + added
