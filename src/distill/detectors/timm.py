"""timm's convolutional networks as bodies. A network must have maps of the strides 4, 8, 16 and 32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.imaging.resizing import average_squares
from distill.types import DistillError

TIMM = "timm/"
"""Prefix of the name of a timm backbone."""


class TimmBody(nn.Module):
    """A ``features_only`` network of timm, `net`. It is both a `StagedNetwork` and the body below a neck.

    Args:
        name: timm's name of the network.

    Raises:
        DistillError: timm is missing, timm does not know the name, or the network has no maps (B, C, H, W) of strides
            4, 8, 16 and 32.
    """

    input_stride = 1
    """See `average_squares`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm_network(name, features_only=True)
        info = self.net.feature_info
        at = {stride: index for index, stride in enumerate(info.reduction())}  # the last map at each stride
        if not at.keys() >= {4, 8, 16, 32}:
            raise DistillError(
                f"backbone.name: expected maps of strides 4, 8, 16, 32; {TIMM}{name} has {info.reduction()}"
            )
        self.chosen = [at[stride] for stride in (4, 8, 16, 32)]
        self.channels = tuple(info.channels()[index] for index in self.chosen)
        stages = [_below(self.net, info.module_name()[index]) for index in self.chosen]
        stem = _below(self.net, info.module_name()[at[2]]) if 2 in at else _before(self.net, stages[0])
        self.ends = tuple(f"net.{end}" for end in (stem, *stages))
        self.first = 1
        self._check(name)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the maps C2 to C5 of images (B, 3, H, W)."""
        maps = self.net(average_squares(images, self.input_stride))
        return [maps[index] for index in self.chosen]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the stages that the neck uses, of images (B, 3, H, W), with torchvision's names."""
        return {str(index): x for index, x in enumerate(self.maps(images)[self.first - 1 :])}

    @torch.no_grad()
    def _check(self, name: str) -> None:
        try:
            shapes = [tuple(x.shape) for x in self.eval().maps(torch.zeros(1, 3, 64, 96))]
        except Exception as error:  # networks with a fixed input size raise various errors
            raise DistillError(
                f"backbone.name: {TIMM}{name} does not take an image of 64 x 96 pixels: {error}"
            ) from error
        expected = [(1, c, 64 // s, 96 // s) for c, s in zip(self.channels, (4, 8, 16, 32), strict=True)]
        if shapes != expected:
            raise DistillError(f"backbone.name: {TIMM}{name} gives maps of shapes {shapes}, expected {expected}")
        self.train()


def timm_network(name: str, key: str = "backbone.name", **options: Any) -> Any:
    """Build timm's network with a given name.

    Args:
        name: a name in `timm.list_models()`.
        key: the configuration key of the name, for messages.
        options: arguments of `timm.create_model`.

    Raises:
        DistillError: timm is missing, does not know the name, rejects the options, or cannot fetch the weights.
    """
    try:
        import timm
    except ImportError as error:
        raise DistillError(f"{key}: {TIMM}{name} needs timm: install 'distill[timm]'") from error
    if ":" in name or "/" in name:  # timm reads such a name as the address of a model on the Hub or in a folder
        raise DistillError(f"{key}: {TIMM}{name} is an address; expected one of timm's own names, timm.list_models()")
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        asked = ", ".join(f"{option}={value}" for option, value in options.items())
        remedy = "timm.list_models() has the names; weights may come from a file"
        raise DistillError(f"{key}: timm cannot make {name} with {asked} ({error}); {remedy}") from error


def _below(net: nn.Module, name: str) -> str:
    """Path of a classifier's module in a ``features_only`` network: the same, or joined by underscores."""
    return name if name in dict(net.named_modules()) else name.replace(".", "_")


def _before(net: nn.Module, name: str) -> str:
    """Path of the last module without children before the module `name`."""
    leaves: list[str] = [leaf for leaf, module in net.named_modules() if not list(module.children())]
    first = next(index for index, leaf in enumerate(leaves) if f"{leaf}.".startswith(f"{name}."))
    return leaves[max(0, first - 1)]
