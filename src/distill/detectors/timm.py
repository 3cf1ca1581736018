"""Any convolutional network of timm's as a body, as far as its maps have the strides that a neck is built on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.types import DistillError

TIMM = "timm/"
"""What the name of a timm backbone begins with."""


class TimmBody(nn.Module):
    """One of timm's ``features_only`` networks, `net`: a `Trunk`, and at once the body below a neck.

    Raises:
        DistillError: timm is missing, does not know the name, or has no maps (B, C, H, W) of strides 4, 8, 16 and 32.
    """

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
        """(B, 3, H, W) -> C2..C5."""
        found = self.net(images)
        return [found[index] for index in self.chosen]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the stages that the neck is built on, by torchvision's names."""
        return {str(index): x for index, x in enumerate(self.maps(images)[self.first - 1 :])}

    @torch.no_grad()
    def _check(self, name: str) -> None:
        try:
            shapes = [tuple(x.shape) for x in self.eval().maps(torch.zeros(1, 3, 64, 96))]
        except Exception as error:  # whatever a network of a fixed size raises
            raise DistillError(
                f"backbone.name: {TIMM}{name} does not take an image of 64 x 96 pixels: {error}"
            ) from error
        expected = [(1, c, 64 // s, 96 // s) for c, s in zip(self.channels, (4, 8, 16, 32), strict=True)]
        if shapes != expected:
            raise DistillError(f"backbone.name: {TIMM}{name} gives maps of shapes {shapes}, expected {expected}")
        self.train()


def timm_network(name: str, **options: Any) -> Any:
    """timm's network of that name, built with its `options`.

    Raises:
        DistillError: timm is missing, does not know the name, or cannot have the options or fetch its weights.
    """
    try:
        import timm
    except ImportError as error:
        raise DistillError(f"backbone.name: {TIMM}{name} needs timm: install 'distill[timm]'") from error
    if ":" in name or "/" in name:  # to timm the address of a model, on the Hub or in a folder
        raise DistillError(
            f"backbone.name: {TIMM}{name} is an address; expected one of timm's own names, timm.list_models()"
        )
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        asked = ", ".join(f"{option}={value}" for option, value in options.items())
        remedy = "timm.list_models() has the names; weights may come from a file, by backbone.weights"
        raise DistillError(f"backbone.name: timm cannot make {name} with {asked} ({error}); {remedy}") from error


def _below(net: nn.Module, name: str) -> str:
    """Where timm put a module of the classifier: at its own path, or joined by underscores."""
    return name if name in dict(net.named_modules()) else name.replace(".", "_")


def _before(net: nn.Module, name: str) -> str:
    """The last leaf before the module `name`."""
    leaves: list[str] = [each for each, module in net.named_modules() if not list(module.children())]
    first = next(index for index, leaf in enumerate(leaves) if f"{leaf}.".startswith(f"{name}."))
    return leaves[max(0, first - 1)]
