"""The papers' pictures of a run: what happens in the necks of student, baseline and teacher on some images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.analysis.feature_maps import (
    CKA,
    PARTS,
    Cells,
    channel_distances,
    gradient_norms,
    ground_truth_edges,
    object_cells,
    part_means,
    ssim_map,
)
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.losses.masks import map_size
from distill.progress import track
from distill.types import Batch, DetectorSpec, MissingOutputError, Pyramid, View, require


class Example(NamedTuple):
    """Maps of one image for its picture."""

    image: Tensor
    """(3, H, W) uint8, without padding."""
    image_id: int
    gradients: dict[str, Tensor]
    """Model -> gradient of the detection loss at the finest level, (h, w)."""
    ssim: dict[str, Tensor]
    """Model -> similarity with the teacher at the finest level, (h, w)."""
    edges: dict[str, Tensor]
    """Model or ``teacher`` -> edge matrix (R, R). Empty with fewer than two objects."""


@dataclass
class NeckReport:
    """Results by model and stride. Keys of models are those of the given detectors."""

    images: int
    gradients: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Mean length of the gradient of the detection loss, inside and outside of objects."""
    distances: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Mean |s - t| of each channel, (2, C), inside and outside of objects."""
    ssim: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Mean structural similarity with the teacher, inside and outside of objects."""
    cka: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Linear CKA with the teacher, inside and outside of objects, and of all cells."""
    edges: dict[str, float] = field(default_factory=dict)
    """Half the mean squared difference of the edges from the teacher's, DSIG's error."""
    examples: list[Example] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Analysis -> why it was left out."""


class _Sums:
    """Sums over the images, of one model."""

    def __init__(self) -> None:
        self.gradients: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, 2, dtype=torch.float64))
        self.ssim: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, 2, dtype=torch.float64))
        self.distances: dict[int, Tensor] = {}
        self.cka: dict[int, dict[str, CKA]] = defaultdict(lambda: {part: CKA() for part in (*PARTS, "all")})
        self.edges: list[float] = []


def skipped_analyses(
    models: Mapping[str, DetectorSpec], teacher: DetectorSpec | None, classes: Sequence[str]
) -> dict[str, str]:
    """Analysis, or ``analysis of model``, that these detectors do not allow -> the reason.

    Args:
        models: the student, and perhaps a baseline, by name.
        teacher: the teacher; None without one.
        classes: class names of the data.
    """
    reasons: dict[str, str] = {}
    pairs = ("distances", "ssim", "cka", "edges")
    if teacher is None:
        reasons |= dict.fromkeys(pairs, "the run has no teacher")
    for name, spec in models.items():
        if reason := _missing("neck", {name: spec}):
            reasons[f"gradients of {name}"] = reason
        elif spec.classes != tuple(classes):
            reasons[f"gradients of {name}"] = f"the {name} has other classes than the data, so it has no loss there"
        if teacher is None:
            continue
        both = {name: spec, "teacher": teacher}
        if reason := _missing("neck", both):
            reasons |= {f"{analysis} of {name}": reason for analysis in ("distances", "ssim", "cka")}
        elif not set(spec.neck) & set(teacher.neck):
            words = f"no shared stride: {list(spec.neck)} and the teacher's {list(teacher.neck)}"
            reasons |= {f"{analysis} of {name}": words for analysis in ("distances", "ssim", "cka")}
        elif any(spec.neck[stride] != teacher.neck[stride] for stride in set(spec.neck) & set(teacher.neck)):
            words = (
                f"the necks have unequal channels, {list(spec.neck.values())} and the teacher's "
                f"{list(teacher.neck.values())}; cka compares them"
            )
            reasons |= {f"{analysis} of {name}": words for analysis in ("distances", "ssim")}
        if reason := _missing("roi_features", both):
            reasons[f"edges of {name}"] = reason
    return reasons


def _missing(output: str, specs: Mapping[str, DetectorSpec]) -> str | None:
    """Why one of these detectors does not have an output; None if all have it."""
    for role, spec in specs.items():
        try:
            require(spec, output, "analyze", role)
        except MissingOutputError:
            return f"the {role} is a {spec.family}, which has no {output}"
    return None


def examine_necks(
    models: Mapping[str, Detector],
    teacher: Detector | None,
    data: DetectionData,
    split: str,
    images: int,
    device: torch.device,
    examples: int = 4,
    bar: str | None = None,
) -> NeckReport:
    """Compare the necks of detectors with the teacher's, on images that are spread evenly over a split.

    The detectors are moved to the device, in evaluation mode. Their weights do not change.

    Args:
        models: the student, and perhaps a baseline, by name.
        teacher: the teacher; None leaves out the comparisons with it.
        data: the data set.
        split: `train`, `val` or `test`.
        images: number of images; DeFeat's figure 8 uses 20.
        device: device of the detectors.
        examples: number of images whose maps are kept for pictures, the first ones.
        bar: caption of a progress bar; None for no bar.
    """
    for detector in (*models.values(), *([teacher] if teacher else [])):
        detector.to(device).eval()
    specs = {name: model.spec for name, model in models.items()}
    reasons = skipped_analyses(specs, None if teacher is None else teacher.spec, data.classes)
    count = len(data.records(split))
    chosen = np.unique(np.linspace(0, count - 1, min(images, count)).round().astype(int)).tolist()
    sums, report = {name: _Sums() for name in models}, NeckReport(len(chosen), skipped=reasons)
    for index in track(chosen, bar):
        batch = data.load_batch(split, [index]).to(device)
        target = teacher.view(batch, training=False, frozen=True) if teacher else None
        height, width = batch.sizes[0]
        example = Example(batch.images[0, :, :height, :width].cpu(), batch.ids[0], {}, {}, {})
        for name, detector in models.items():
            _add_image(name, detector, target, batch, sums[name], reasons, example)
        if len(report.examples) < examples and (example.gradients or example.ssim or example.edges):
            report.examples.append(example)
    for name, parts in sums.items():
        _finish(report, name, parts)
    return report


def _add_image(
    name: str,
    detector: Detector,
    teacher: View | None,
    batch: Batch,
    sums: _Sums,
    reasons: Mapping[str, str],
    example: Example,
) -> None:
    def wanted(analysis: str) -> bool:
        return not {analysis, f"{analysis} of {name}"} & set(reasons)

    if wanted("gradients"):
        with torch.enable_grad():
            view = detector.view(batch, training=True, seed=0)
            norms = gradient_norms(torch.stack(list(view.losses.values())).sum(), view.neck)
        cells = _cells(batch, view.neck)
        for stride, values in norms.items():
            sums.gradients[stride] += part_means(values, cells[stride]).cpu()
        example.gradients[name] = _unpadded(next(iter(norms.items())), batch)
    if teacher is None:
        return
    view = detector.view(batch, training=False, frozen=True)
    if wanted("cka"):
        _compare_maps(name, view, teacher, batch, sums, wanted("distances"), example)
    if wanted("edges") and len(batch.targets[0].boxes) > 1:
        (own,), (target,) = ground_truth_edges(view), ground_truth_edges(teacher)
        sums.edges.append(float((own - target).square().mean()) / 2)
        example.edges["teacher"], example.edges[name] = target.cpu(), own.cpu()


def _compare_maps(
    name: str, view: View, teacher: View, batch: Batch, sums: _Sums, equal_channels: bool, example: Example
) -> None:
    shared = {stride: x for stride, x in view.neck.items() if stride in teacher.neck}
    cells = _cells(batch, shared)
    for stride, x in shared.items():
        target = teacher.neck[stride]
        inside, outside = cells[stride]
        for part, member in {"inside": inside, "outside": outside, "all": inside | outside}.items():
            sums.cka[stride][part].add(x, target, member)
        if equal_channels:
            distances = channel_distances(x, target, cells[stride]).cpu()
            sums.distances[stride] = sums.distances.get(stride, torch.zeros_like(distances)) + distances
            similarity = ssim_map(x, target)
            sums.ssim[stride] += part_means(similarity, cells[stride]).cpu()
            if stride == next(iter(shared)):
                example.ssim[name] = _unpadded((stride, similarity), batch)


def _cells(batch: Batch, maps: Pyramid) -> dict[int, Cells]:
    boxes = [target.boxes for target in batch.targets]
    return object_cells(boxes, batch.sizes, {stride: map_size(x) for stride, x in maps.items()})


def _unpadded(level: tuple[int, Tensor], batch: Batch) -> Tensor:
    stride, values = level
    height, width = batch.sizes[0]
    return values[0, : -(-height // stride), : -(-width // stride)].detach().float().cpu()


def _finish(report: NeckReport, name: str, sums: _Sums) -> None:
    if sums.gradients:
        report.gradients[name] = {stride: _mean(values) for stride, values in sums.gradients.items()}
    if sums.ssim:
        report.ssim[name] = {stride: _mean(values) for stride, values in sums.ssim.items()}
    if sums.distances:
        report.distances[name] = {
            stride: values[:, :-1] / values[:, -1:]
            for stride, values in sums.distances.items()  # 0 / 0 is NaN
        }
    if sums.cka:
        report.cka[name] = {stride: [part.value() for part in parts.values()] for stride, parts in sums.cka.items()}
    if sums.edges:
        report.edges[name] = float(np.mean(sums.edges))
    elif not {"edges", f"edges of {name}"} & set(report.skipped):
        report.skipped[f"edges of {name}"] = "no image has two objects"


def _mean(values: Tensor) -> list[float]:
    """Sums and counts of the parts (2, 2) -> their means; NaN for a part without cells."""
    return [total / count if count else float("nan") for total, count in values.tolist()]


def neck_tables(report: NeckReport) -> dict[str, list[dict[str, object]]]:
    """Name of a table -> its rows, for the tables that have rows. A value that does not exist is empty."""
    tables: dict[str, list[dict[str, object]]] = {
        name: [
            {"model": model, "stride": stride, **_cells_of(means)}
            for model, levels in values.items()
            for stride, means in levels.items()
        ]
        for name, values in (("gradients", report.gradients), ("ssim", report.ssim), ("cka", report.cka))
    }
    tables["distances"] = [
        {"model": model, "stride": stride, "channel": channel, **_cells_of(row)}
        for model, maps in report.distances.items()
        for stride, means in maps.items()
        for channel, row in enumerate(means.T.tolist())
    ]
    tables["edges"] = [{"model": model, "error": error} for model, error in report.edges.items()]
    return {name: rows for name, rows in tables.items() if rows}


def _cells_of(means: Sequence[float]) -> dict[str, object]:
    return {name: "" if math.isnan(value) else value for name, value in zip((*PARTS, "all"), means, strict=False)}
