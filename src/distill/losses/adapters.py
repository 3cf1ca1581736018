"""Adapters: from the student's channels to the teacher's, built from known channels, never lazily.

Their start values come from generators of their own, so that building them changes nobody else's draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from distill.types import DistillError

KERNELS = (1, 3, None)
STARTS = ("defeat", "fgfi", "default")


def adapter(
    student: int, teacher: int, kernel: int | None = 3, relu: bool = False, start: str = "defeat", seed: int = 0
) -> nn.Module:
    """A convolution (B, student, H, W) -> (B, teacher, H, W), with bias, with or without ReLU.

    Args:
        student: channels that come in.
        teacher: channels that go out.
        kernel: 1 or 3; None for no adapter, which needs equal channels.
        relu: whether a ReLU follows the convolution; without one there is nothing that it could follow.
        start: ``default`` is torch's own: weights and bias uniform within 1/sqrt(fan in). ``defeat`` draws the weights
            from N(0, 1), takes the remainder by 2 and multiplies by 1e-4 (DeFeat's and FGFI's released code), so that
            the adapter starts near 0. ``fgfi`` has these weights and a bias of 0.
        seed: decides the start values, alone.

    Raises:
        DistillError: for an unknown kernel or start, or unequal channels or a ReLU without a kernel.
    """
    if kernel not in KERNELS or start not in STARTS:
        raise DistillError(
            f"adapter: expected a kernel of {KERNELS} and a start of {STARTS}, got kernel={kernel} and start={start!r}"
        )
    if kernel is None:
        if student != teacher:
            raise DistillError(
                f"adapter: none was asked for (kernel=null), but the student has {student} channels and the teacher"
                f" {teacher}. Set adapter.kernel=1 or 3, or give both models as many"
            )
        if relu:
            raise DistillError(
                "adapter: a ReLU follows a convolution, but none was asked for (kernel=null). Set adapter.kernel=1 or 3, or "
                "adapter.relu=false (of DeFeat: adapter.neck_relu, adapter.backbone_relu)"
            )
        return nn.Identity()
    # Made on the meta device, the layer draws no start values from the global stream.
    convolution = nn.Conv2d(student, teacher, kernel, padding=kernel // 2, device="meta").to_empty(device="cpu")
    _start(convolution, start, torch.Generator().manual_seed(seed))
    return nn.Sequential(convolution, nn.ReLU()) if relu else convolution


def adapters(
    student: Mapping[int, int],
    teacher: Mapping[int, int],
    levels: Iterable[int],
    kernel: int | None = 3,
    relu: bool = False,
    start: str = "defeat",
    seed: int = 0,
) -> nn.ModuleDict:
    """One :func:`adapter` per level, by ``str(stride)``; `student` and `teacher` give the channels by stride.

    A level's start values depend on `seed` and its stride, not on which other levels there are.
    """
    return nn.ModuleDict({str(s): adapter(student[s], teacher[s], kernel, relu, start, seed + s) for s in levels})


def _start(convolution: nn.Conv2d, start: str, generator: torch.Generator) -> None:
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    bound = 1 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        if start == "default":
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.normal_(generator=generator).fmod_(2).mul_(1e-4)
        bias.uniform_(-bound, bound, generator=generator).mul_(start != "fgfi")
