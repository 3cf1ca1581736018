"""Compares configuration and data of all processes before the first step, and limits the time of an exchange."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import lightning as L

from distill.distributed import gather_objects
from distill.training.lightning_compat import data_module
from distill.types import DistillError

MAX_DIFFERENCES = 5
"""Maximum number of differences in a message."""
LOST_PROCESS_MESSAGES = (
    "Timed out",
    "timed out",
    "timeout",
    "Connection closed by peer",
    "Connection reset by peer",
    "peer closed",
)


class ConsistencyCheck(L.Callback):
    """Refuses to start a run whose processes have different configurations or data.

    Args:
        values: function of the run's data module. Returns name -> value of everything that must be equal. Called only
            with several processes.
    """

    def __init__(self, values: Callable[[Any], Mapping[str, str]]) -> None:
        self.values = values

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare as soon as the processes can communicate."""
        if trainer.world_size > 1:
            require_equal_values(self.values(data_module(trainer)))


def require_equal_values(values: Mapping[str, str]) -> None:
    """Compare the values of all processes: first one hash per process, then the values if the hashes differ.

    Raises:
        DistillError: on every process, with the names and values that differ.
    """
    if len(set(gather_objects(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()))) == 1:
        return
    values_of_ranks = gather_objects(dict(values))
    names = sorted({name for values in values_of_ranks for name in values})
    different = [name for name in names if len({values.get(name) for values in values_of_ranks}) > 1]
    lines = "\n".join(
        f"  {name}: {_values_by_rank([values.get(name) for values in values_of_ranks])}"
        for name in different[:MAX_DIFFERENCES]
    )
    more = f"\n  … and {len(different) - MAX_DIFFERENCES} more" if len(different) > MAX_DIFFERENCES else ""
    raise DistillError(
        f"the processes of this run have different values:\n{lines}{more}\nStart all of them with the same "
        "overrides, configuration files and data. Start a sweep or a tuner once, not in every process"
    )


def _values_by_rank(values: list[str | None]) -> str:
    """Every distinct value, shortened, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault("missing" if value is None else value[:80], []).append(rank)
    return ", ".join(f"{value} on rank {', '.join(map(str, on))}" for value, on in ranks.items())


def exchange_timeout(minutes: float = 10.0) -> timedelta:
    """Maximum time that a process waits for the others in one exchange.

    Raises:
        DistillError: the time is not above 0.
    """
    if not minutes > 0:
        raise DistillError(f"trainer.strategy.timeout.minutes: expected a number above 0, got {minutes}")
    return timedelta(minutes=minutes)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of an exchange means that another process has ended or does not answer."""
    words = str(error)
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in LOST_PROCESS_MESSAGES)
