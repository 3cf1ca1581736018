"""Adapters: convolutions from the student's channels to the teacher's.

The channels are known at construction, so no layer is lazy. Start values come from separate generators, so building an
adapter does not change the global random stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from distill.types import DistillError

Kernel = Literal["auto", 1, 3] | None

KERNELS = ("auto", 1, 3, None)
STARTS = ("defeat", "fgfi", "default")


def adapter(
    student: int, teacher: int, kernel: Kernel = 3, relu: bool = False, start: str = "defeat", seed: int = 0
) -> nn.Module:
    """A convolution with bias, (B, student, H, W) -> (B, teacher, H, W), or the identity.

    Args:
        student: input channels.
        teacher: output channels.
        kernel: 1 or 3; None for the identity, which needs equal channels; ``auto`` for the identity where the channels
            are equal and for 1 elsewhere.
        relu: whether a ReLU follows the convolution. The identity takes no ReLU.
        start: start values. ``default``: torch's own, weights and bias uniform within 1/sqrt(fan in). ``defeat``:
            weights from N(0, 1), the remainder by 2, times 1e-4 (released code of DeFeat and FGFI), so that the adapter
            starts near 0. ``fgfi``: the weights of ``defeat`` and a bias of 0.
        seed: determines the start values.

    Raises:
        DistillError: unknown kernel or start; kernel None with unequal channels; a ReLU without a convolution.
    """
    if kernel not in KERNELS or start not in STARTS:
        raise DistillError(
            f"adapter: expected a kernel of {KERNELS} and a start of {STARTS}, got kernel={kernel} and start={start!r}"
        )
    if kernel is None and student != teacher:
        raise DistillError(
            f"adapter: kernel=null means no adapter, but the student has {student} channels and the teacher {teacher}. "
            "Set adapter.kernel=auto, 1 or 3, or give both models equal channels"
        )
    size = (None if student == teacher else 1) if kernel == "auto" else kernel
    if size is None:
        if relu:
            raise DistillError(
                f"adapter: a ReLU follows a convolution, but kernel={kernel or 'null'} makes none for equal channels. "
                "Set adapter.kernel=1 or 3, or adapter.relu=false (of DeFeat: adapter.neck_relu, adapter.backbone_relu)"
            )
        return nn.Identity()
    # A layer built on the meta device draws no start values from the global stream.
    convolution = nn.Conv2d(student, teacher, size, padding=size // 2, device="meta").to_empty(device="cpu")
    _set_start_values(convolution, start, torch.Generator().manual_seed(seed))
    return nn.Sequential(convolution, nn.ReLU()) if relu else convolution


def adapters(
    student: Mapping[int, int],
    teacher: Mapping[int, int],
    levels: Iterable[int],
    kernel: Kernel = 3,
    relu: bool = False,
    start: str = "defeat",
    seed: int = 0,
) -> nn.ModuleDict:
    """One :func:`adapter` per level, keyed by ``str(stride)``; `student` and `teacher` are channels by stride.

    The start values of a level depend on `seed` and its stride, not on the other levels.
    """
    return nn.ModuleDict({str(s): adapter(student[s], teacher[s], kernel, relu, start, seed + s) for s in levels})


def _set_start_values(convolution: nn.Conv2d, start: str, generator: torch.Generator) -> None:
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    bound = 1 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        if start == "default":
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.normal_(generator=generator).fmod_(2).mul_(1e-4)
        bias.uniform_(-bound, bound, generator=generator).mul_(start != "fgfi")
