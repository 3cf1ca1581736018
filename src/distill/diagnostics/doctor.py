"""Measurements before a run, without training: data, classes, shapes, terms, time and memory.

All functions return plain containers.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.data.datamodule import DetectionData
from distill.data.records import Records
from distill.diagnostics.memory import peak
from distill.diagnostics.sampled_evaluation import synchronize
from distill.imaging.resizing import padded_size
from distill.precision import autocast_context
from distill.training.callbacks.term_check import largest_gradient
from distill.training.distiller import Distiller, StepResult
from distill.training.gradients import neck_gradient_norms, shares, trained_maps
from distill.training.schedule import Schedule
from distill.types import Batch, DetectorSpec, Pyramid, View

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""COCO's size class -> lowest area and upper bound (exclusive), in pixels of the original image."""


# -- data


def describe_split(data: DetectionData, split: str) -> dict[str, Any]:
    """Count the images and boxes of a split, after faults were corrected.

    Args:
        data: the data set.
        split: name of the split.

    Returns:
        Numbers of images, boxes, crowds, difficult boxes and empty images; ``corrected``: fault -> number; ``classes``:
        class -> size -> number of boxes, without crowds.
    """
    records = data.records(split)
    checked = data.checked[split]
    corrected = {**checked.corrected, "turned by EXIF": checked.turned, **checked.skipped, **checked.remarks}
    return {
        "images": len(records),
        "boxes": len(records.labels),
        "crowds": int(records.crowd.sum()),
        "difficult": int(records.difficult.sum()),
        "empty": int((np.bincount(records.row_images()[~records.crowd], minlength=len(records)) == 0).sum()),
        "corrected": {fault: count for fault, count in corrected.items() if count},
        "classes": _per_class(records, data.classes),
    }


def _per_class(records: Records, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in classes}
    for label, area in zip(records.labels[~records.crowd].tolist(), records.area[~records.crowd].tolist(), strict=True):
        size = next(size for size, (low, high) in SIZES.items() if low <= area < high)
        counts[classes[label - 1]][size] += 1
    return {name: {size: count[size] for size in SIZES} | {"all": count.total()} for name, count in counts.items()}


def padding_share(data: DetectionData) -> float:
    """Return the share of padding in all pixels of the training batches of the first epoch.

    All images are resized to the last of the configured sizes.
    """
    (images, batches), transform = data.labeled_batches(), data.train_transform
    used = total = 0
    for keys in batches:
        sizes = [transform.fit(images.size(index)) for _, index in keys]
        height, width = padded_size(sizes, data.pad_to)
        total += height * width * len(sizes)
        used += sum(h * w for h, w in sizes)
    return 1 - used / total if total else 0.0


# -- classes


def class_lists(data: Sequence[str], student: Sequence[str], teacher: Sequence[str] | None) -> list[dict[str, Any]]:
    """Compare the class lists of data, student and teacher.

    Returns:
        For each label, the class names in ``data``, ``student`` and ``teacher``, and ``taught``: whether the teacher
        knows the class of the data. ``taught`` is None without a teacher, or for a label that the data does not have.
    """
    lists = {"data": data, "student": student, "teacher": teacher or ()}
    return [
        {"label": index + 1}
        | {owner: names[index] if index < len(names) else None for owner, names in lists.items()}
        | {"taught": None if teacher is None or index >= len(data) else data[index] in teacher}
        for index in range(max(map(len, lists.values())))
    ]


# -- shapes, adapters, terms


def shapes(student: View, teacher: View | DetectorSpec | None) -> list[dict[str, Any]]:
    """Return the shapes (C, H, W) of the student's and the teacher's maps for each stride.

    A teacher that is given by its spec has shapes (C,).
    """
    columns: dict[str, Mapping[int, list[int]]] = _map_sizes("student", student)
    if isinstance(teacher, DetectorSpec):
        columns["teacher body"] = {stride: [channels] for stride, channels in teacher.body.items()}
        columns["teacher neck"] = {stride: [channels] for stride, channels in teacher.neck.items()}
    elif teacher is not None:
        columns |= _map_sizes("teacher", teacher)
    strides = sorted({stride for column in columns.values() for stride in column})
    return [{"stride": s} | {name: column.get(s) for name, column in columns.items()} for s in strides]


def _map_sizes(role: str, view: View) -> dict[str, Mapping[int, list[int]]]:
    neck = {f"{role} neck": _sizes(view.neck)} if "neck" in view.spec.outputs else {}
    return {f"{role} body": _sizes(view.body), **neck}


def _sizes(maps: Pyramid) -> dict[int, list[int]]:
    return {stride: list(x.shape[1:]) for stride, x in maps.items()}


def adapters(losses: nn.ModuleDict) -> list[dict[str, Any]]:
    """List the layers that the losses train, with name, layer and number of parameters."""
    return [
        {"name": name, "layer": str(layer), "parameters": count}
        for name, layer in losses.named_modules()
        if (count := sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad))
    ]


def measure_terms(step: StepResult) -> dict[str, dict[str, float | bool]]:
    """Measure each term of a step: value, weight, weighted value, and share of the gradient at the neck.

    The share is that of `training.gradients`. ``reaches`` says whether the term has a gradient on any map of the
    student's neck or body. The terms are those of the images with labels.
    """
    student, weights = step.student, step.weights
    maps = trained_maps(student)
    parts = shares(neck_gradient_norms(student, step.labeled, weights))
    return {
        name: {
            "value": value.item(),
            "weight": weights[name],
            "loss": weights[name] * value.item(),
            "share": parts[name].item(),
            "reaches": bool(largest_gradient(value, maps)),
        }
        for name, value in step.labeled.items()
    }


# -- pace


def measure_pace(
    module: Distiller,
    precision: str,
    batches: Iterable[Batch],
    device: torch.device,
    count: int,
    patience: float,
) -> dict[str, Any]:
    """Measure the seconds per batch for loading, forward and backward pass, and the peak memory.

    No weight changes. The first batch is a warm-up. The measurement ends after `count` further batches, or after
    `patience` seconds.

    Returns:
        ``seconds_per_batch``: the median; ``batches``: number of measured batches; ``peak_bytes``.
    """
    times: list[float] = []

    def passes() -> None:
        start = began = time.perf_counter()
        for batch in islice(batches, count + 1):
            with autocast_context(precision, device):
                loss = module.compute_step(batch.to(device), 0, 0.0).loss
            torch.autograd.backward(loss)
            module.zero_grad()
            del loss
            synchronize(device)
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
            if len(times) > 1 and start - began > patience:
                break

    peaks = peak(passes, device)
    warm = sorted(times[1:] or times)
    return {
        "seconds_per_batch": warm[len(warm) // 2],
        "batches": len(warm),
        "peak_bytes": int(peaks.get("device" if device.type == "cuda" else "host", 0)),
    }


def device_bytes(device: torch.device) -> int:
    """Return the size of the device's memory in bytes; for a CPU, the size of the main memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(module: nn.Module, schedule: Schedule) -> int:
    """Estimate the bytes of the optimizer's state, which the optimizer allocates in its first step."""
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    optimizer = getattr(schedule.optimizer, "func", schedule.optimizer)
    return trained * (2 if "adam" in optimizer.__name__.lower() else 1)
