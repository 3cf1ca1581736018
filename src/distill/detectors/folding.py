"""Folding of batch norms with fixed statistics into the preceding convolutions. The maps stay the same and cost less.

Names do not decide which norm follows which convolution. Hooks record the pairs during one forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
ALIKE = 1e-3
"""Tolerance relative to the largest value of a map: far above rounding errors (about 1e-6), far below a wrong fold."""

Maps = Mapping[int, Tensor]


@torch.no_grad()
def fold(network: nn.Module, run: Callable[[], Maps]) -> int:
    """Fold all batch norms of a network that can be folded, in place.

    The convolutions get new weight tensors. No existing tensor is written to. ::

        (W x + c - mean) / sqrt(var + eps) * g + b  =  (W s) x + (c - mean) s + b,     s = g / sqrt(var + eps)

    The new weights are computed in float64. A norm is folded only if its statistics are fixed, its input is the output
    of one plain convolution, and no other module reads that output.

    Args:
        network: in evaluation mode.
        run: a forward pass on a constant input, which returns maps of the network. The first call finds the pairs of
            convolution and norm. A second call, after folding, compares the maps.

    Returns:
        Number of folded norms. If the maps differ after folding, the network is restored and the result is 0.
    """
    pairs, before = _watched(network, run)
    undo = [(conv, dict(conv._parameters), name, norm) for conv, name, norm in pairs]
    for conv, name, norm in pairs:
        _fold(conv, norm)
        network.set_submodule(name, _rest(norm))
    if _alike(before, run()):
        return len(pairs)
    for conv, parameters, name, norm in undo:
        conv._parameters.update(parameters)
        network.set_submodule(name, norm)
    return 0


def _watched(network: nn.Module, run: Callable[[], Maps]) -> tuple[list[tuple[nn.Conv2d, str, Any]], Maps]:
    """Convolutions with the names and modules of the norms that read each of their outputs; and the maps of the run."""
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # keeps the outputs alive, so that no id is reused
    calls: Counter[nn.Module] = Counter()
    followed: Counter[tuple[nn.Module, nn.Module]] = Counter()

    def after(module: nn.Module, _: Any, output: Tensor) -> None:
        calls[module] += 1
        made[id(output)] = module, output, output._version

    def ahead(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        conv, output, version = made.get(id(inputs[0]), (None, inputs[0], -1))
        if conv is not None and output._version == version:  # else the output was changed in place
            followed[conv, module] += 1

    names = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_hook(after) for module in names if _plain(module)]
    hooks += [module.register_forward_pre_hook(ahead) for module in names if _settled(module)]
    try:
        maps = run()
    finally:
        for hook in hooks:
            hook.remove()
    always = [pair for pair, times in followed.items() if times == calls[pair[0]] == calls[pair[1]]]
    return [(conv, names[norm], norm) for conv, norm in always if isinstance(conv, nn.Conv2d)], maps


def _plain(module: nn.Module) -> bool:
    """Whether the output is linear in the module's weight parameter.

    False for subclasses that standardise or compute the weight, or that pad the input themselves.
    """
    if not isinstance(module, nn.Conv2d):
        return False
    kind = type(module)
    own = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return own and "weight" in module._parameters


def _settled(module: nn.Module) -> bool:
    """Whether the module is a batch norm with fixed statistics and a finite affine form.

    An epsilon of 0 with a variance of 0 is not finite.
    """
    if not isinstance(module, NORMS) or module.running_var is None:
        return False
    scale, shift = _affine(module)
    return not module.training and bool(torch.isfinite(scale).all() and torch.isfinite(shift).all())


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift that the norm applies, each (C,) float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    one = torch.ones((), dtype=torch.float64, device=var.device)
    scale = (one if norm.weight is None else norm.weight.double()) * (var + norm.eps).rsqrt()
    return scale, (0 * one if norm.bias is None else norm.bias.double()) - mean * scale


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double()

    weight, bias = fuse_conv_bn_weights(
        wide(conv.weight),  # type: ignore[arg-type]
        wide(conv.bias),
        wide(norm.running_mean),  # type: ignore[arg-type]
        wide(norm.running_var),  # type: ignore[arg-type]
        norm.eps,
        wide(norm.weight),
        wide(norm.bias),
    )
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def _rest(norm: Any) -> nn.Module:
    """The module that replaces a folded norm: the identity, or timm's drop and activation of the norm."""
    rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    return rest.eval()


def _alike(before: Maps, after: Maps) -> bool:
    # The network may have had values that are not finite before folding: only finite values set the tolerance.
    scales = {level: float(maps.nan_to_num(0.0, 0.0, 0.0).abs().amax()) for level, maps in before.items()}
    return all(
        torch.allclose(after[level], maps, rtol=0, atol=ALIKE * scales[level], equal_nan=True)
        for level, maps in before.items()
    )
