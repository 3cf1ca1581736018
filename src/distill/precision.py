"""The precision of a run by its name, and the lift to float32 where half precision would spoil a number."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """At least float32: half precision is lifted, float32 and float64 stay the very same tensor."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def resolve_precision(precision: str, cuda: bool) -> str:
    """What ``trainer.precision`` means on such a device: ``auto`` is bf16-mixed on CUDA and 32-true elsewhere."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if cuda else "32-true"


def autocast_context(precision: str, device: torch.device) -> torch.autocast:
    """What Lightning's ``precision`` does to a forward pass."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=precision.endswith("mixed"), cache_enabled=False)
