"""The report of the bench, and its verdict: the bottleneck of each option, and how to reduce it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from distill.diagnostics.bench.clock import Spread
from distill.diagnostics.memory import Memory

PEAK_LIMIT = 1.05
"""Highest expected ratio of a step's peak memory to the sum of its parts."""


@dataclass
class Cost:
    """Costs of one step: the student-only step, or the step of a distill option."""

    step: Spread
    """Seconds of the whole step."""
    flops: float
    """FLOPs of convolutions and matrix products, forward and backward."""
    memory: dict[str, float]
    """Peak bytes of ``host`` (resident) and ``device`` (allocated), where the system reports them."""


@dataclass
class OptionCost(Cost):
    """Costs of a distill option. A ratio is relative to the student-only step in the same rounds."""

    student: Spread
    """The student-only step in the same rounds."""
    teacher: Spread
    """Forward pass of the teacher, up to the last stage that the losses read."""
    adapters: Spread
    """Forward and backward pass of the layers that the losses train."""
    student_recompute: Spread
    """Forward and backward pass of the student layers that the losses recompute.

    An example is the head on the teacher's RoIs.
    """
    ratio: Spread
    """The whole step / the student-only step. The other ratios have the same denominator."""
    teacher_ratio: Spread
    adapters_ratio: Spread
    student_recompute_ratio: Spread
    loss_overhead: Spread
    """step / (student + teacher + adapters + student_recompute) - 1.

    The overhead includes losses, masks, and all operations without weights.
    """
    teacher_flops: float
    """FLOPs of the teacher's forward pass."""
    stages: list[str]
    """Stages of the teacher that the losses read, in order."""
    allowed: float
    """Highest expected `loss_overhead`, from `distill.diagnostics.bench.measure.MAX_OVERHEAD`."""
    bytes: Memory
    """Memory of the step, part by part."""


@dataclass
class Report:
    """All results of the bench, in seconds unless a name says otherwise."""

    setting: dict[str, Any]
    """Configuration of the measurement."""
    student: Cost
    """Costs of the student-only step."""
    options: dict[str, OptionCost]
    """Distill option -> its costs."""
    skipped: dict[str, str]
    """Distill option that was not measured -> the reason."""
    loader: dict[str, float]
    """Result of `measure_loader`."""
    evaluation: dict[str, float]
    """``images``: number of measured images; ``detect`` and ``metric``: seconds per 1,000 images."""
    verdict: list[str] = field(default_factory=list)
    """Result of `verdict`, one line each."""

    def plain(self) -> dict[str, Any]:
        """Return the report in plain containers, for JSON."""
        return asdict(self)


def verdict(report: Report, batch_size: int) -> list[str]:
    """Return lines that name the bottleneck of each option and how to reduce it."""
    lines = []
    supply = report.loader["images_per_second"]
    for name, cost in {"student alone": report.student, **report.options}.items():
        demand = batch_size / cost.step.median
        if supply < demand:
            lines.append(
                f"{name}: the loader is the bottleneck, with {supply:.1f} images/s where the step could take "
                f"{demand:.1f}. Raise data.workers, set data.cache=ram, or keep smaller images on disk"
            )
        elif isinstance(cost, OptionCost):
            lines.append(f"{name}: {_bottleneck(cost)}")
    for name, cost in report.options.items():
        if cost.loss_overhead.median > cost.allowed:
            lines.append(
                f"{name}: losses and masks take {100 * cost.loss_overhead.median:.1f} % in addition to all layers; up "
                f"to {100 * cost.allowed:.0f} % is expected"
            )
        if cost.bytes.peak > PEAK_LIMIT * cost.bytes.sum:
            lines.append(
                f"{name}: the step's peak memory is {cost.bytes.peak / cost.bytes.sum:.2f} times the sum of its parts: "
                "the teacher's maps, during its forward pass, are large compared with the activations of the student"
                if cost.bytes.spared < (PEAK_LIMIT - 1) * cost.bytes.sum
                else f"{name}: {cost.bytes.spared / 2**20:.1f} MiB that no backward pass needs are kept until then: "
                "does a loss keep a View, or maps of a View?"
            )
    return lines or [
        "student alone: the step is the bottleneck: a smaller data.min_size or model, or trainer.precision"
    ]


def _bottleneck(cost: OptionCost) -> str:
    parts = {
        "the student's own step": (1.0, "a smaller data.min_size or model, or trainer.precision"),
        "the teacher's forward pass": (
            cost.teacher_ratio.median,
            "teacher.fold and teacher.channels_last make it cheaper, teacher.dtype=bfloat16 more than halves it (on a "
            "CPU with AVX512-BF16 or AMX), and so does a smaller teacher",
        ),
        "the forward and backward pass of the adapters": (
            cost.adapters_ratio.median,
            "fewer levels, or adapter.kernel=1",
        ),
        "the student's own layers, which the losses recompute,": (
            cost.student_recompute_ratio.median,
            "fewer terms that read the student on the teacher's regions",
        ),
    }
    part, (share, remedy) = max(parts.items(), key=lambda item: item[1][0])
    return (
        f"{part} is the bottleneck, {100 * share / cost.ratio.median:.0f} % of a step that costs "
        f"{cost.ratio.median:.2f} times the student's: {remedy}"
    )
