"""Collective operations between the processes (ranks) of a run. A single process needs no process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """Sum ``values`` over all processes. Every process must call this function.

    Returns:
        the sum, of the shape of ``values``, and the number of processes.
    """
    processes = world_size()
    if processes > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values, processes


def sum_with_gradient(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes; the gradient of each process is that of the sum of all processes' losses.

    Every process must call this function, and run the backward pass, if one of them does.
    """
    return _SumOverRanks.apply(values) if world_size() > 1 else values


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)[0]


def gather_objects(value: Any) -> list[Any]:
    """Gather a picklable object from every process, in the order of ranks. Every process must call this function."""
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
