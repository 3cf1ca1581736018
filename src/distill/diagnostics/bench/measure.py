"""Every number of the bench: steps in rounds, operations, memory, the loader, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.diagnostics.bench.clock import Clock, Spread
from distill.diagnostics.bench.report import Cost, OptionCost
from distill.diagnostics.bench.step import Step
from distill.diagnostics.memory import Memory, live, peak, stored
from distill.evaluation.evaluate import Evaluation, MakeMetric
from distill.types import Batch

GLUE = {"neck": 0.03, "regions": 0.10}
"""What losses, masks and the rest may cost at most beside all layers: of maps, and of regions."""
REGIONS = {"roi_features", "roi_logits", "roi_boxes", "rois", "proposals", "predictions"}


def measure_student(plain: Step, clock: Clock, repeats: int = 10, warmup: int = 2) -> Cost:
    """The student-only step."""
    (seconds,) = _rounds([partial(clock.time, plain.run)], repeats, warmup)
    return Cost(Spread.of(seconds), _flops(plain.run), peak(plain.run, plain.batch.images.device))


def measure_option(plain: Step, step: Step, clock: Clock, repeats: int = 10, warmup: int = 2) -> OptionCost:
    """A step with losses: each round takes the student-only step, this one, its teacher, its adapters, and what of the
    student runs again."""
    theirs, ours = step.teach()
    parts = (partial(clock.time, plain.run), partial(clock.time, step.run), partial(_reading, step, clock))
    layers = (partial(clock.time, step.adapters()), partial(clock.time, step.again()))
    times = _rounds([*parts, *layers], repeats, warmup)
    return _option_cost(plain, step, (theirs.stages, ours.stages), *times)


def _rounds(parts: Sequence[Callable[[], float]], repeats: int, warmup: int) -> list[list[float]]:
    """Seconds of each part in each round that counts."""
    rounds = [[part() for part in parts] for _ in range(warmup + repeats)]
    return [list(seconds) for seconds in zip(*rounds[warmup:], strict=True)]


def _option_cost(
    plain: Step,
    step: Step,
    stages: tuple[list[str], list[str]],
    student: Sequence[float],
    whole: Sequence[float],
    teacher: Sequence[float],
    adapters: Sequence[float],
    again: Sequence[float],
) -> OptionCost:
    def by_student(seconds: Sequence[float]) -> Spread:
        return Spread.of([each / own for each, own in zip(seconds, student, strict=True)])

    rest = [each / sum(parts) - 1 for each, *parts in zip(whole, student, teacher, adapters, again, strict=True)]
    return OptionCost(
        *(Spread.of(whole), _flops(step.run), peak(step.run, step.batch.images.device)),
        student=Spread.of(student),
        teacher=Spread.of(teacher),
        adapters=Spread.of(adapters),
        again=Spread.of(again),
        ratio=by_student(whole),
        teacher_ratio=by_student(teacher),
        adapters_ratio=by_student(adapters),
        student_recompute_ratio=by_student(again),
        loss_overhead=Spread.of(rest),
        teacher_flops=_teacher_flops(step),
        stages=stages[0],
        allowed=GLUE["regions" if REGIONS & {*stages[0], *stages[1]} else "neck"],
        bytes=measure_memory(plain, step),
    )


def _reading(step: Step, clock: Clock) -> float:
    """Seconds that the losses wait for the stages of the teacher, and for guests of their own."""
    return clock.seconds(*step.teach(clock.mark)[0].spans)


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _teacher_flops(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        theirs, _ = step.teach(counter.get_total_flops)
    return float(sum(end - start for start, end in theirs.spans))


def measure_memory(plain: Step, step: Step) -> Memory:
    """The parts of a step's memory, and its peak. Both steps have run before, so that the optimisers have their states."""
    device = step.batch.images.device
    taught, ours, student = (stored(each, device) for each in (step.taught(), step.trained(), plain.trained()))
    (most_alone, kept_alone), (most, kept) = _allocated(plain), _allocated(step)
    return Memory(
        student=student + most_alone,
        teacher=taught,
        losses=ours - student + stored(step.losses.parameters(), device),  # and the gradients of these
        held=step.held(),
        peak=ours + taught + most,
        kept=kept - kept_alone,
    )


def _allocated(step: Step) -> tuple[float, float]:
    """Bytes that a step takes beyond what is there before it: at its peak, and between forward and backward pass."""
    kept: list[float] = []
    step.optimizer.zero_grad(set_to_none=True)
    with live(step.batch.images.device) as count:
        step.run(lambda: kept.append(count.now))
        return count.most, kept[0]


def measure_loader(data: DetectionData, batches: int = 20) -> dict[str, float]:
    """``images_per_second`` of the training loader once its workers are warm, by the wall clock, and ``workers``."""
    loader = data.train_dataloader()
    stream = iter(_endless(loader))
    for _ in range(2 + data.workers * data.prefetch):  # what lay ready before anybody asked
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


def measure_evaluation(
    detector: Detector,
    data: DetectionData,
    metrics: Sequence[MakeMetric],
    device: torch.device,
    split: str = "val",
    images: int = 50,
) -> dict[str, float]:
    """Wall-clock seconds per 1,000 images: ``detect``, loading included, and ``metric``; measured on ``images``."""
    batches, seen = [], 0
    training = detector.training
    detector.train(False)
    try:
        for batch in data.loader(split):
            batches.append(batch)
            seen += len(batch)
            if seen >= images:
                break
        evaluation = Evaluation(detector, _part(data.ground_truth(split), batches), data.classes, metrics, device)
        evaluation.update(batches[0].to(device))  # warms up; the same image given twice counts once
        start = time.perf_counter()
        for batch in batches:
            evaluation.update(batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        evaluation.compute()
    finally:
        detector.train(training)
    scale = 1000 / seen
    return {
        "images": float(seen),
        "detect": scale * (middle - start),
        "metric": scale * (time.perf_counter() - middle),
    }


def _part(truth: Mapping[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    """Ground truth of the images of these batches."""
    ids = {image for batch in batches for image in batch.ids}
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in ids],
        "annotations": [each for each in truth["annotations"] if each["image_id"] in ids],
    }


def settle(detector: Detector, batch: Batch) -> None:
    """Give an untrained detector's live norms the statistics of a batch: else its maps grow from block to block."""
    norms = [layer for layer in detector.modules() if type(layer) is nn.BatchNorm2d and layer.track_running_stats]
    before = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    detector.train(True)
    _ = detector.view(batch, training=False, frozen=True).neck
    detector.train(False)
    for layer, momentum in zip(norms, before, strict=True):
        layer.momentum = momentum
