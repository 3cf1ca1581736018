"""What a norm's name means: whose statistics a backbone's batch norms use, and what of them is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from distill.types import DistillError


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm on its running statistics, which never move; weight and bias are trained (mmdet's `norm_eval`).

    The behaviour does not hang on `.training`, so whatever switches modes cannot wake the statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """Statistics over all processes on an accelerator; on a CPU, where torch has none, over the own process."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
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


class _Activated(nn.Module):
    """Puts timm's drop and activation behind a norm, as timm's own batch norms have them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
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


def norm_layer(norm: str, eps: float) -> Callable[..., nn.Module]:
    """The constructor behind a norm's name: frozen, batch_fixed_stats, batch or sync."""
    return partial(NORMS[check_norm(norm)], eps=eps)


def check_norm(norm: str) -> str:
    """The name of a norm, if it is one."""
    if norm not in NORMS:
        raise DistillError(f"backbone.norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    return norm


def convert_norms(body: nn.Module, norm: str, eps: float | None) -> None:
    """Turn every batch norm below `body`, timm's with an activation too, into `norm`; values stay, and `eps` if None.

    Raises:
        DistillError: there is no batch norm, so that nothing but ``batch`` with its own epsilon can be had.
    """
    found = {name: layer for name, layer in body.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    if not found and (norm != "batch" or eps is not None):
        raise DistillError(
            f"backbone.norm: this backbone has no batch norm to make {norm}; set backbone.norm=batch and backbone.norm_eps=null"
        )
    for name, layer in found.items():
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
    """Give every normalisation on running statistics below `module` this epsilon; live ones keep theirs."""
    for layer in module.modules():
        if isinstance(layer, (FrozenBatchNorm2d, FixedBatchNorm2d)):
            layer.eps = eps
