"""The kinds of batch norm that a backbone can have. They differ in their statistics and in what is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from distill.types import DistillError


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fixed running statistics and trainable weight and bias (MMDetection's `norm_eval`).

    The layer ignores `.training`. A switch to training mode therefore does not change the statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a map (B, C, H, W)."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """Batch norm with statistics over all processes.

    Torch does not support this on a CPU. There the statistics are those of the own process.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a map (B, C, H, W)."""
        if input.device.type != "cpu":
            return super().forward(input)
        update = self.training and self.running_mean is not None
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factor = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, update, factor, self.eps
        )


NORMS: dict[str, Callable[..., nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch_fixed_stats": FixedBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": SyncBatchNorm2d,
}
"""Name of a norm -> class."""


class _Activated(nn.Module):
    """A norm followed by timm's drop and activation, as in timm's own batch norms."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a map (B, C, H, W), then apply drop and activation."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


class FrozenBatchNormAct2d(_Activated, FrozenBatchNorm2d):  # type: ignore[misc]
    """`FrozenBatchNorm2d` with an activation."""


class FixedBatchNormAct2d(_Activated, FixedBatchNorm2d):
    """`FixedBatchNorm2d` with an activation."""


class SyncBatchNormAct2d(_Activated, SyncBatchNorm2d):
    """`SyncBatchNorm2d` with an activation."""


ACTIVATED: dict[str, Callable[..., Any]] = {
    "frozen": FrozenBatchNormAct2d,
    "batch_fixed_stats": FixedBatchNormAct2d,
    "sync": SyncBatchNormAct2d,
}
"""Name of a norm -> class with an activation. ``batch`` is missing: timm's own layer stays."""


def norm_layer(norm: str, eps: float) -> Callable[..., nn.Module]:
    """Return the constructor of a norm: ``frozen``, ``batch_fixed_stats``, ``batch`` or ``sync``, with an epsilon."""
    return partial(NORMS[check_norm(norm)], eps=eps)


def check_norm(norm: str) -> str:
    """Return `norm` if it is the name of a norm.

    Raises:
        DistillError: `norm` is not the name of a norm.
    """
    if norm not in NORMS:
        raise DistillError(f"backbone.norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    return norm


def convert_norms(body: nn.Module, norm: str, eps: float | None) -> None:
    """Replace every batch norm in a network by another kind, and keep its tensors.

    timm's batch norms with an activation are replaced too; their activation stays.

    Args:
        body: the network, changed in place.
        norm: a name in `NORMS`.
        eps: the new epsilon; None keeps each layer's epsilon.

    Raises:
        DistillError: the body has no batch norm, and another norm than ``batch`` or an epsilon is requested.
    """
    batch_norms = {name: layer for name, layer in body.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    if not batch_norms and (norm != "batch" or eps is not None):
        raise DistillError(
            f"backbone.norm: this backbone has no batch norm to make {norm}; "
            "set backbone.norm=batch and backbone.norm_eps=null"
        )
    for name, layer in batch_norms.items():
        body.set_submodule(name, _converted(layer, check_norm(norm), layer.eps if eps is None else eps))


def _converted(layer: nn.BatchNorm2d, norm: str, eps: float) -> nn.Module:
    if norm == "batch":
        layer.eps = eps
        return layer
    activated = hasattr(layer, "act")
    momentum = {} if norm == "frozen" else {"momentum": layer.momentum}
    new: nn.Module = (ACTIVATED if activated else NORMS)[norm](layer.num_features, eps=eps, **momentum)
    new.load_state_dict(layer.state_dict(), strict=True)
    if activated:
        new.drop, new.act = layer.drop, layer.act
    return new


def set_eps(module: nn.Module, eps: float) -> None:
    """Set the epsilon of every norm with fixed statistics in `module`. Norms with batch statistics keep theirs."""
    for layer in module.modules():
        if isinstance(layer, (FrozenBatchNorm2d, FixedBatchNorm2d)):
            layer.eps = eps
