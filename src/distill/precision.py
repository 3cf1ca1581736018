"""Where half precision would spoil a number: the lift to float32."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """At least float32: half precision is lifted, float32 and float64 stay the very same tensor."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
