"""Seconds of a piece of work, on whatever device, and how they spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.types import DistillError

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])


class Clock:
    """Seconds between two marks: of the device's own time on CUDA, of the wall clock or the process elsewhere.

    Args:
        device: where the work is done.
        kind: ``wall``, or ``cpu``: the processor's time of all threads, which a busy machine disturbs less.

    Raises:
        DistillError: an unknown kind.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        if kind not in CLOCKS:
            raise DistillError(f"clock: expected one of {', '.join(CLOCKS)}, got {kind!r}")
        self.cuda = device.type == "cuda"
        self.kind = "cuda events" if self.cuda else kind
        self._now = CLOCKS[kind]

    def mark(self) -> Any:
        """This moment, in the order of the device's work."""
        if not self.cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, *spans: tuple[Any, Any]) -> float:
        """The sum over pairs of marks; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(float(start.elapsed_time(end)) / 1000 for start, end in spans)
        return float(sum(end - start for start, end in spans))

    def time(self, run: Callable[[], object]) -> float:
        """What a call takes."""
        if self.cuda:
            torch.cuda.synchronize()  # what was queued before is not its own
        start = self.mark()
        run()
        return self.seconds((start, self.mark()))
