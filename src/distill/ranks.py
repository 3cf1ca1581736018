"""The processes of a run, called ranks: how many there are, and what they tell one another. Alone, everything is its own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def summed(values: Tensor) -> tuple[Tensor, int]:
    """Sum of `values` over all processes, and their number. All must come here."""
    processes = place()[1]
    if processes > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values, processes


def gather(own: Any) -> list[Any]:
    """What every process has to say, in the order of ranks. All must come here."""
    processes = place()[1]
    found: list[Any] = [own] * processes
    if processes > 1:
        dist.all_gather_object(found, own)
    return found
