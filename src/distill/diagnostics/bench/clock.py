"""Clocks for CPU and CUDA, and the spread of repeated measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.types import DistillError

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Kind of a clock -> function that returns seconds."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])


class Clock:
    """Seconds between two marks: CUDA events on CUDA, wall clock or processor time elsewhere.

    Args:
        device: the measured device.
        kind: ``wall``, or ``cpu``, which is the processor time of all threads and varies less on a busy machine.

    Raises:
        DistillError: the kind is unknown.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        if kind not in CLOCKS:
            raise DistillError(f"clock: expected one of {', '.join(CLOCKS)}, got {kind!r}")
        self.cuda = device.type == "cuda"
        self.kind = "cuda events" if self.cuda else kind
        self._now = CLOCKS[kind]

    def mark(self) -> Any:
        """Return a mark at the end of the work that is queued so far."""
        if not self.cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, *spans: tuple[Any, Any]) -> float:
        """Return the seconds between the marks of each pair, summed over all pairs. The method waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(float(start.elapsed_time(end)) / 1000 for start, end in spans)
        return float(sum(end - start for start, end in spans))

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds that a call takes."""
        if self.cuda:
            torch.cuda.synchronize()  # do not count work that was queued before
        start = self.mark()
        run()
        return self.seconds((start, self.mark()))
