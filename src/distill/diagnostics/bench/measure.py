"""The measurements of the bench: training steps, FLOPs, memory and the data loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.diagnostics.bench.clock import Clock, Spread
from distill.diagnostics.bench.report import Cost, OptionCost
from distill.diagnostics.bench.step import Step
from distill.diagnostics.memory import Memory, live, peak, stored
from distill.types import Batch

MAX_OVERHEAD = {"neck": 0.03, "regions": 0.10}
"""Highest expected `OptionCost.loss_overhead`: ``neck`` for losses that read only maps, ``regions`` for the others."""
REGIONS = {"roi_features", "roi_logits", "roi_boxes", "rois", "proposals", "predictions"}
"""Stages of a View that compute regions or outputs of regions."""


def measure_student(alone: Step, clock: Clock, repeats: int = 10, warmup: int = 2) -> Cost:
    """Measure the costs of the student-only step."""
    (seconds,) = _rounds([partial(clock.time, alone.run)], repeats, warmup)
    return Cost(Spread.of(seconds), _flops(alone.run), peak(alone.run, alone.batch.images.device))


def measure_option(alone: Step, step: Step, clock: Clock, repeats: int = 10, warmup: int = 2) -> OptionCost:
    """Measure the costs of a step with losses.

    Each round times the student-only step, the whole step and the parts of the whole step once.

    Args:
        alone: the student-only step.
        step: the step with losses.
        clock: measures the seconds.
        repeats: number of measured rounds.
        warmup: number of rounds before the measurement.
    """
    teacher, student = step.record_reads()
    parts = (partial(clock.time, alone.run), partial(clock.time, step.run), partial(_teacher_seconds, step, clock))
    layers = (partial(clock.time, step.adapter_passes()), partial(clock.time, step.recompute_passes()))
    times = _rounds([*parts, *layers], repeats, warmup)
    return _option_cost(alone, step, (teacher.stages, student.stages), *times)


def _rounds(parts: Sequence[Callable[[], float]], repeats: int, warmup: int) -> list[list[float]]:
    """Seconds of each part in each measured round."""
    rounds = [[part() for part in parts] for _ in range(warmup + repeats)]
    return [list(seconds) for seconds in zip(*rounds[warmup:], strict=True)]


def _option_cost(
    alone: Step,
    step: Step,
    stages: tuple[list[str], list[str]],
    student: Sequence[float],
    whole: Sequence[float],
    teacher: Sequence[float],
    adapters: Sequence[float],
    recompute: Sequence[float],
) -> OptionCost:
    def ratio(seconds: Sequence[float]) -> Spread:
        return Spread.of([part / own for part, own in zip(seconds, student, strict=True)])

    rounds = zip(whole, student, teacher, adapters, recompute, strict=True)
    return OptionCost(
        *(Spread.of(whole), _flops(step.run), peak(step.run, step.batch.images.device)),
        student=Spread.of(student),
        teacher=Spread.of(teacher),
        adapters=Spread.of(adapters),
        student_recompute=Spread.of(recompute),
        ratio=ratio(whole),
        teacher_ratio=ratio(teacher),
        adapters_ratio=ratio(adapters),
        student_recompute_ratio=ratio(recompute),
        loss_overhead=Spread.of([seconds / sum(parts) - 1 for seconds, *parts in rounds]),
        teacher_flops=_teacher_flops(step),
        stages=stages[0],
        allowed=MAX_OVERHEAD["regions" if REGIONS & {*stages[0], *stages[1]} else "neck"],
        bytes=measure_memory(alone, step),
    )


def _teacher_seconds(step: Step, clock: Clock) -> float:
    """Seconds that the losses wait for stages of the teacher and for the losses' frozen models."""
    return clock.seconds(*step.record_reads(clock.mark)[0].spans)


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _teacher_flops(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        teacher, _ = step.record_reads(counter.get_total_flops)
    return float(sum(end - start for start, end in teacher.spans))


def measure_memory(alone: Step, step: Step) -> Memory:
    """Measure the parts of a step's memory, and the peak.

    Both steps must have run before, so that the optimizers have a state.
    """
    device = step.batch.images.device
    lists = (step.teacher_tensors(), step.trained_tensors(), alone.trained_tensors())
    teacher, trained, student = (stored(tensors, device) for tensors in lists)
    (peak_alone, kept_alone), (peak_bytes, kept) = _allocated(alone), _allocated(step)
    return Memory(
        student=student + peak_alone,
        teacher=teacher,
        losses=trained - student + stored(step.losses.parameters(), device),  # their gradients have equal size
        held=step.kept_bytes(),
        peak=trained + teacher + peak_bytes,
        kept=kept - kept_alone,
    )


def _allocated(step: Step) -> tuple[float, float]:
    """Bytes that a step allocates: at the peak, and between forward and backward pass."""
    kept: list[float] = []
    step.optimizer.zero_grad(set_to_none=True)
    with live(step.batch.images.device) as count:
        step.run(lambda: kept.append(count.now))
        return count.most, kept[0]


def measure_loader(data: DetectionData, batches: int = 20) -> dict[str, float]:
    """Measure ``images_per_second`` of the training loader by the wall clock, after a warm-up.

    The result also has the number of ``workers``.
    """
    loader = data.train_dataloader()
    stream = iter(_endless(loader))
    for _ in range(2 + data.workers * data.prefetch):  # batches that the workers prefetched
        next(stream)
    start, images = time.perf_counter(), 0
    for batch in islice(stream, batches):
        images += len(batch)
    return {"images_per_second": images / (time.perf_counter() - start), "workers": float(data.workers)}


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def set_norm_statistics(detector: Detector, batch: Batch) -> None:
    """Set the batch norm statistics of an untrained detector to those of a batch.

    Without this, the values of the maps grow from block to block.
    """
    norms = [layer for layer in detector.modules() if type(layer) is nn.BatchNorm2d and layer.track_running_stats]
    before = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    detector.train(True)
    _ = detector.view(batch, training=False, frozen=True).neck
    detector.train(False)
    for layer, momentum in zip(norms, before, strict=True):
        layer.momentum = momentum
