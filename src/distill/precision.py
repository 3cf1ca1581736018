"""The numerical precision of a run, and the conversion to float32 of numbers that need its range or resolution."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.types import DistillError

PRECISIONS = {
    **{name: name for name in ("32-true", "bf16-mixed", "16-mixed")},
    **{"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"},
}
"""Name of a precision, or Lightning's short form -> name. Weights are always float32."""


def upcast(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32. Return any other tensor unchanged, as the same object."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def resolve_precision(precision: str | int, cuda: bool) -> str:
    """Replace ``auto`` by the precision of the device: ``bf16-mixed`` on CUDA, ``32-true`` elsewhere.

    Args:
        precision: the value of ``trainer.precision``.
        cuda: whether the run computes on CUDA.

    Raises:
        DistillError: an unknown precision, or one with weights in another type than float32.
    """
    if precision == "auto":
        return "bf16-mixed" if cuda else "32-true"
    if str(precision) not in PRECISIONS:
        raise DistillError(
            f"trainer.precision={precision}: expected auto, {', '.join(dict.fromkeys(PRECISIONS.values()))}. The "
            "weights stay in float32, because small updates would be lost in half precision"
        )
    return PRECISIONS[str(precision)]


def autocast_context(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context that Lightning enters for a forward pass at this precision.

    Args:
        precision: a precision of Lightning, such as ``bf16-mixed``. Only ``*-mixed`` enables autocast.
        device: device of the forward pass.
    """
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=precision.endswith("mixed"), cache_enabled=False)
