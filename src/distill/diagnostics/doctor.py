"""What a run would be like, measured without training: data, classes, shapes, terms, pace. Plain containers, for tables and JSON."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.datamodule import DetectionData
from distill.data.records import Record
from distill.data.transforms import padded_size, resized_size
from distill.detectors.base import Detector
from distill.diagnostics.memory import peak
from distill.evaluation.evaluate import Evaluation, MakeMetric, ground_truth_of
from distill.precision import autocast
from distill.training.callbacks.term_check import slope
from distill.training.distiller import Distiller, StepResult
from distill.training.schedule import Schedule
from distill.types import Batch, DetectorSpec, Pyramid, View

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""COCO's: area in pixels of the original image."""


# -- data


def describe_split(data: DetectionData, split: str) -> dict[str, Any]:
    """Counts of a split as it is used: boxes per class and size (no crowds among them), crowds, empties, what was mended."""
    records = data.records(split)
    checked = data.checked[split]
    mended = {**checked.mended, "turned by EXIF": checked.turned, **checked.skipped}
    return {
        "images": len(records),
        "boxes": sum(len(record.labels) for record in records),
        "crowds": sum(int(record.crowd.sum()) for record in records),
        "difficult": sum(int(record.difficult.sum()) for record in records),
        "empty": sum(not (~record.crowd).any() for record in records),
        "mended": {fault: count for fault, count in mended.items() if count},
        "classes": _per_class(records, data.classes),
    }


def _per_class(records: Sequence[Record], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in classes}
    for record in records:
        for label, area, crowd in zip(record.labels, record.area, record.crowd, strict=True):
            if not crowd:
                size = next(size for size, (low, high) in SIZES.items() if low <= area < high)
                counts[classes[label - 1]][size] += 1
    return {name: {size: found[size] for size in SIZES} | {"all": found.total()} for name, found in counts.items()}


def padding_share(data: DetectionData) -> float:
    """SumAndCount of the training batches' pixels that is padding, in the first epoch, at the last of the configured sizes."""
    loader: Any = data.train_dataloader()
    images, transform = loader.dataset, data.train_transform
    seen = drawn = 0
    for keys in loader.batch_sampler:
        sizes = [resized_size(images.size(index), transform.min_sizes[-1], transform.max_size) for _, index in keys]
        height, width = padded_size(sizes, data.pad_to)
        drawn += height * width * len(sizes)
        seen += sum(h * w for h, w in sizes)
    return 1 - seen / drawn if drawn else 0.0


# -- teacher


def sample(data: DetectionData, most: int) -> list[int]:
    """Places of up to `most` validation images, spread evenly, those of one padded size next to one another."""
    count = len(data.records("val"))
    chosen = sorted({round(place * (count - 1) / max(1, most - 1)) for place in range(most)}) if count > most else None
    sizes = data.padded_sizes("val")
    return sorted(range(count) if chosen is None else chosen, key=lambda index: (sizes[index], index))


def measure_ap(
    detector: Detector,
    data: DetectionData,
    metrics: Sequence[MakeMetric],
    device: torch.device,
    most: int,
    patience: float,
) -> dict[str, Any]:
    """A detector's metrics on a sample of the validation split, and seconds per image; ends early after `patience` seconds."""
    places, truth = sample(data, most), data.ground_truth("val")
    detector.to(device).eval()
    found: list[tuple[Batch, Any]] = []
    start = time.perf_counter()
    for indices in _runs(places, data.padded_sizes("val"), data.eval_batch_size):
        if time.perf_counter() - start > patience:
            break
        batch = data.batch("val", indices).to(device)
        found.append((batch, detector.view(batch, training=False, frozen=True).detections))
    _wait(device)
    seconds = time.perf_counter() - start
    ids = [image for batch, _ in found for image in batch.ids]
    evaluation = Evaluation(detector, ground_truth_of(truth, ids), data.classes, metrics, device)
    for batch, detections in found:
        evaluation.add(batch, detections)
    return {"images": len(ids), "seconds_per_image": seconds / max(1, len(ids)), "values": evaluation.compute()}


def _runs(places: Sequence[int], sizes: Sequence[Any], most: int) -> Iterator[list[int]]:
    run: list[int] = []
    for place in places:
        if run and (len(run) == most or sizes[run[0]] != sizes[place]):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def class_lists(data: Sequence[str], student: Sequence[str], teacher: Sequence[str] | None) -> list[dict[str, Any]]:
    """Label by label the names of data, student and teacher side by side, and whether the teacher knows the data's."""
    lists = {"data": data, "student": student, "teacher": teacher or ()}
    return [
        {"label": place + 1}
        | {who: names[place] if place < len(names) else None for who, names in lists.items()}
        | {"taught": None if teacher is None or place >= len(data) else data[place] in teacher}
        for place in range(max(map(len, lists.values())))
    ]


# -- shapes, adapters, terms


def shapes(student: View, teacher: View | DetectorSpec | None) -> list[dict[str, Any]]:
    """Stride by stride (C, H, W) of both bodies and necks; of a teacher that is only planned (C,)."""
    columns: dict[str, Mapping[int, list[int]]] = {
        "student body": _sizes(student.body),
        "student neck": _sizes(student.neck),
    }
    if isinstance(teacher, DetectorSpec):
        columns["teacher body"] = {stride: [channels] for stride, channels in teacher.body.items()}
        columns["teacher neck"] = {stride: [channels] for stride, channels in teacher.neck.items()}
    elif teacher is not None:
        columns |= {"teacher body": _sizes(teacher.body), "teacher neck": _sizes(teacher.neck)}
    strides = sorted({stride for column in columns.values() for stride in column})
    return [{"stride": s} | {name: column.get(s) for name, column in columns.items()} for s in strides]


def _sizes(maps: Pyramid) -> dict[int, list[int]]:
    return {stride: list(x.shape[1:]) for stride, x in maps.items()}


def adapters(losses: nn.ModuleDict) -> list[dict[str, Any]]:
    """Every layer that the losses bring along and train."""
    return [
        {"name": name, "layer": str(layer), "parameters": own}
        for name, layer in losses.named_modules()
        if (own := sum(each.numel() for each in layer.parameters(recurse=False) if each.requires_grad))
    ]


def measure_terms(step: StepResult) -> dict[str, dict[str, float | bool]]:
    """Each term of a step: value, weight, weighted value, and its share of the gradient at the neck.

    The share is the L2 norm of the weighted term's gradient on all maps of the neck over the sum of these norms.
    ``reaches`` says whether it has a gradient on any map of the student's neck or body.
    """
    student, weights = step.student, step.weights
    neck = [x for x in student.neck.values() if x.requires_grad]
    maps = [x for x in (*student.body.values(), *student.neck.values()) if x.requires_grad]
    norms = {name: weights[name] * _norm(value, neck) for name, value in step.terms.items()}
    total = sum(norms.values()) or 1.0
    return {
        name: {
            "value": value.item(),
            "weight": weights[name],
            "loss": weights[name] * value.item(),
            "share": norms[name] / total,
            "reaches": bool(slope(value, maps)),
        }
        for name, value in step.terms.items()
    }


def _norm(term: Tensor, maps: Sequence[Tensor]) -> float:
    if not term.requires_grad or not maps:
        return 0.0
    found = torch.autograd.grad(term, list(maps), retain_graph=True, allow_unused=True)
    squares = sum(each.double().square().sum().item() for each in found if each is not None)
    return math.sqrt(squares)


# -- pace


def measure_pace(
    module: Distiller,
    precision: str,
    batches: Iterable[Batch],
    device: torch.device,
    count: int,
    patience: float,
) -> dict[str, Any]:
    """Seconds per batch for loading, forward and backward pass, after a warm-up batch; and the peak memory.

    No weight changes. The measurement ends after `count` batches, or after `patience` seconds.
    """
    times: list[float] = []

    def passes() -> None:
        start = began = time.perf_counter()
        for batch in islice(batches, count + 1):
            with autocast(precision, device):
                loss = module.compute_step(batch.to(device), 0, 0.0).loss
            torch.autograd.backward(loss)
            module.zero_grad()
            del loss
            _wait(device)
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
            if len(times) > 1 and start - began > patience:
                break

    taken = peak(passes, device)
    warm = sorted(times[1:] or times)
    return {
        "seconds_per_batch": warm[len(warm) // 2],
        "batches": len(warm),
        "peak_bytes": int(taken.get("device" if device.type == "cuda" else "host", 0)),
    }


def memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(module: nn.Module, schedule: Schedule) -> int:
    """Bytes of the optimizer's state, which is allocated in its first step."""
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    optimizer = getattr(schedule.optimizer, "func", schedule.optimizer)
    return trained * (2 if "adam" in optimizer.__name__.lower() else 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
