"""What a trained detector costs to use: latency, FLOPs and size. One row joins these costs with its results."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.detectors.folding import fold
from distill.diagnostics.bench.clock import Clock, Spread
from distill.training.gradients import head_maps
from distill.types import Batch, DistillError
from distill.units import MISSING, percent

WARMUP = 2
"""Detections before the measurement."""
PATIENCE = 20.0
"""Seconds after which no further image is measured."""


@dataclass(frozen=True)
class Cost:
    """Costs of a detector on one device, with one image at a time, in float32 and with folded batch norms."""

    milliseconds: float
    """Median latency of an image: from the resized image on the device to the detections after NMS."""
    images_per_second: float
    """1000 / `milliseconds`."""
    gflops: float
    """Floating point operations per image, in billions, as ``torch.utils.flop_counter`` counts them: matrix products
    and convolutions; a multiplication and an addition are two operations."""
    megabytes: float
    """Size of all weights and buffers in float32, in millions of bytes: about the size of ``student.pt``."""
    parameters: int
    images: int
    """Number of images that were measured."""
    device: str


@dataclass(frozen=True)
class ModelRow:
    """A model in a table: its results and its costs."""

    name: str
    results: Mapping[str, float]
    """Metrics by name, from 0 to 1."""
    cost: Cost | None
    """None: not measured."""

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """Texts of the row: name, metrics in percent, and the columns of `COST_COLUMNS`."""
        found = [percent(self.results.get(name, -1.0)) for name in metrics]
        if self.cost is None:
            return [self.name, *found, *(MISSING for _ in COST_COLUMNS)]
        cost = self.cost
        numbers = (cost.milliseconds, cost.images_per_second, cost.gflops, cost.megabytes, cost.parameters / 1e6)
        return [self.name, *found, *(f"{number:.3g}" if number < 100 else f"{number:.0f}" for number in numbers)]


COST_COLUMNS = ("ms", "images/s", "GFLOPs", "MB", "M parameters")


def measure_row(
    name: str,
    results: Mapping[str, float],
    detector: Detector,
    data: DetectionData,
    device: torch.device,
    images: int,
    clock: str = "wall",
) -> ModelRow:
    """A model's results with its costs, measured on up to so many validation images; 0 images: no costs."""
    return ModelRow(name, results, measure_cost(detector, data, device, images, clock) if images else None)


def cost_of(values: Mapping[str, Any] | None) -> Cost | None:
    """The costs that a summary holds; None if there are none."""
    with suppress(TypeError):
        return Cost(**values) if values else None
    return None


def summarize(cost: Cost | None) -> dict[str, Any] | None:
    """Costs in plain containers."""
    return None if cost is None else asdict(cost)


@torch.no_grad()
def measure_cost(
    detector: Detector, data: DetectionData, device: torch.device, images: int, clock: str = "wall"
) -> Cost:
    """Measure a copy of a detector on evenly spread validation images, one at a time, without their loading.

    Batch norms are folded into the convolutions, as an export does. The detector itself does not change.

    Args:
        detector: the detector.
        data: the data; its evaluation resizes the images.
        device: the device.
        images: largest number of images.
        clock: kind of the clock, see `Clock`.

    Raises:
        DistillError: the split has no images, or `images` is below 1.
    """
    count = len(data.records("val"))
    chosen = sorted({round(i * (count - 1) / max(1, images - 1)) for i in range(images)}) if count else []
    if not chosen:
        raise DistillError(f"cost: expected at least one validation image, got {count} and a limit of {images}")
    batches = [data.load_batch("val", [index]).to(device) for index in chosen]
    folded = folded_copy(detector, batches[0], device)
    timer, times, start = Clock(device, clock), [], time.monotonic()
    with torch.autocast(device.type, enabled=False):
        for batch in [batches[0]] * WARMUP:
            _detect(folded, batch)
        for batch in batches:
            times.append(timer.time(partial(_detect, folded, batch)))
            if time.monotonic() - start > PATIENCE:
                break
        with FlopCounterMode(display=False) as counter:
            _detect(folded, batches[len(batches) // 2])
    seconds = Spread.of(times).median
    tensors = detector.state_dict().values()
    return Cost(
        milliseconds=1000 * seconds,
        images_per_second=1 / seconds if seconds else 0.0,
        gflops=counter.get_total_flops() / 1e9,
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
        parameters=detector.parameters_count,
        images=len(times),
        device=device_name(device),
    )


def folded_copy(detector: Detector, batch: Batch, device: torch.device) -> Detector:
    """A copy of a detector for inference, with batch norms folded where that changes nothing on this batch."""
    folded = copy.deepcopy(detector).to(device).eval()

    def maps() -> Mapping[int, torch.Tensor]:
        return head_maps(folded.view(batch, training=False, frozen=True))

    with torch.autocast(device.type, enabled=False):
        fold(folded.net, maps)
    return folded


def _detect(detector: Detector, batch: Batch) -> None:
    _ = detector.view(batch, training=False, frozen=True).detections


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of a processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
