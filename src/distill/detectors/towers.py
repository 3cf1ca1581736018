"""Towers of dense heads: their convolutions one by one, and the rest of a head behind one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distill.types import DistillError


def split_tower(tower: nn.Module, depth: int) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
    """The layers up to the input of the ReLU behind convolution number `depth`, and the layers behind that ReLU.

    Args:
        tower: blocks of a convolution, a normalization (or none) and a ReLU, nested or flat.
        depth: from 0, with nothing before, to the number of ReLUs.

    Raises:
        DistillError: the tower has fewer ReLUs.
    """
    layers = [layer for layer in tower.modules() if not any(True for _ in layer.children())]
    ends = [index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    if not 0 <= depth <= len(ends):
        raise DistillError(f"depth: expected a number of convolutions from 0 to {len(ends)}, got {depth}")
    return ([], layers) if depth == 0 else (layers[: ends[depth - 1]], layers[ends[depth - 1] + 1 :])


def run_layers(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Apply layers in order."""
    for layer in layers:
        x = layer(x)
    return x
