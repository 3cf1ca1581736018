"""What was measured, and what it means: the bottleneck, and what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from distill.diagnostics.bench.clock import Spread
from distill.diagnostics.memory import Memory

MOST = 1.05
"""What a step's peak of memory may be of the sum of its parts."""


@dataclass
class Cost:
    """What one step costs: the student's own, or that of an option of distillation."""

    step: Spread
    flops: float
    """Of convolutions and matrix products, forward and backward."""
    memory: dict[str, float]
    """Peak bytes of ``host`` (resident) and ``device`` (allocated), where they can be known."""


@dataclass
class OptionCost(Cost):
    """What an option costs. The ratios are to the student-only step, or to what ``glue`` compares with."""

    student: Spread
    """The student-only step in the same rounds."""
    teacher: Spread
    """Forward, as deep as the losses read it."""
    adapters: Spread
    """Forward and backward of all that the losses train."""
    again: Spread
    """Forward and backward of the student's layers that run for the losses alone: its head on the teacher's regions."""
    ratio: Spread
    """To the student-only step."""
    teacher_ratio: Spread
    adapters_ratio: Spread
    student_recompute_ratio: Spread
    loss_overhead: Spread
    """step / (student + teacher + adapters + again) - 1: losses, masks, and all that has no weights."""
    teacher_flops: float
    stages: list[str]
    """Of the teacher, as the losses read them."""
    allowed: float
    """What loss_overhead should stay below: see `distill.diagnostics.bench.measure.GLUE`."""
    bytes: Memory
    """Of the step, part by part."""


@dataclass
class Report:
    """All numbers of a run of the bench, seconds unless a name says otherwise."""

    setting: dict[str, Any]
    student: Cost
    options: dict[str, OptionCost]
    skipped: dict[str, str]
    loader: dict[str, float]
    evaluation: dict[str, float]
    verdict: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return asdict(self)


def verdict(report: Report, batch_size: int) -> list[str]:
    """The bottleneck of each option, and what to change."""
    lines = []
    for name, cost in {"student alone": report.student, **report.options}.items():
        eats, gives = batch_size / cost.step.median, report.loader["images_per_second"]
        if gives < eats:
            lines.append(
                f"{name}: the loader is the bottleneck, with {gives:.1f} images/s where the step could take {eats:.1f}. "
                "Raise data.workers, set data.cache=ram, or keep smaller images on disk"
            )
        elif isinstance(cost, OptionCost):
            lines.append(f"{name}: {_largest(cost)}")
    for name, cost in report.options.items():
        if cost.loss_overhead.median > cost.allowed:
            lines.append(
                f"{name}: losses and masks take {100 * cost.loss_overhead.median:.1f} % beside all layers; up to "
                f"{100 * cost.allowed:.0f} % is expected"
            )
        if cost.bytes.peak > MOST * cost.bytes.sum:
            lines.append(
                f"{name}: the step's peak of memory is {cost.bytes.peak / cost.bytes.sum:.2f} times the sum of its parts: the "
                "teacher's own maps, while it runs, are large beside what the student keeps for its backward pass"
                if cost.bytes.spared < (MOST - 1) * cost.bytes.sum
                else f"{name}: {cost.bytes.spared / 2**20:.1f} MiB that no backward pass asks for stay until it: does a loss keep "
                "a View, or maps of one?"
            )
    return lines or [
        "student alone: the step is the bottleneck: a smaller data.min_size or model, or trainer.precision"
    ]


def _largest(cost: OptionCost) -> str:
    parts = {
        "the student's own step": (1.0, "a smaller data.min_size or model, or trainer.precision"),
        "the teacher's forward pass": (
            cost.teacher_ratio.median,
            "teacher.fold and teacher.channels_last make it cheap, teacher.dtype=bfloat16 more than halves it (on a CPU: one "
            "with AVX512-BF16 or AMX), a smaller teacher is cheaper still",
        ),
        "the forward and backward pass of the adapters": (
            cost.adapters_ratio.median,
            "fewer levels, or adapter.kernel=1",
        ),
        "the student's own layers, which the losses run again,": (
            cost.student_recompute_ratio.median,
            "a term less that reads the student on the teacher's regions",
        ),
    }
    part, (share, remedy) = max(parts.items(), key=lambda item: item[1][0])
    return (
        f"{part} is the bottleneck, {100 * share / cost.ratio.median:.0f} % of a step that costs {cost.ratio.median:.2f} times "
        f"the student's: {remedy}"
    )
