"""The processes of a run, called ranks: how many there are, and what they tell one another. Alone, everything is its own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """Sum of `values` over all processes, and their number. All must come here."""
    processes = world_size()
    if processes > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values, processes


def gather_objects(own: Any) -> list[Any]:
    """What every process has to say, in the order of ranks. All must come here."""
    found: list[Any] = [own] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, own)
    return found
