"""Memory: every byte is counted once, while it lives; a step's peak is that of its parts, or the test finds it."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.diagnostics.bench.measure import measure_memory
from distill.diagnostics.bench.step import Step
from distill.diagnostics.memory import Live, Saved, peak, stored
from distill.losses.base import DistillLoss
from distill.losses.defeat import DeFeat
from distill.losses.dsig import DSIG
from distill.losses.fgfi import FGFI
from distill.losses.ssim import SSIM
from distill.teacher import Teacher
from distill.training.distiller import Distiller
from distill.types import Batch, View
from helpers.bench_detector import CPU, detector

FLOATS = 4


def test_live_bytes_follow_what_is_made_and_what_goes() -> None:
    before = torch.ones(1000)
    with Live() as count:
        made = before + 1
        assert count.now == 1000 * FLOATS
        views = [before[:10], made.view(10, 100).t(), before.detach(), made.add_(1)]
        assert count.now == 1000 * FLOATS
        other = made[:250].clone()
        del made, views[1:]
        assert count.now == 250 * FLOATS
        del other
        assert (count.now, count.most) == (0, 1250 * FLOATS)


def test_live_bytes_hold_what_autograd_alone_keeps_and_the_gradients() -> None:
    weight = torch.ones(500, requires_grad=True)
    with Live() as count:
        total = (weight * 2).exp().sum()
        assert count.now == (500 + 1) * FLOATS  # the result of exp, for its backward pass; what it came from is gone
        total.backward()  # type: ignore[no-untyped-call]
        del total
        assert count.now == 500 * FLOATS
        weight.grad = None
        assert count.now == 0


def test_saved_bytes_are_those_of_autograd_each_once_without_what_was_kept_before() -> None:
    x, y = torch.ones(100, requires_grad=True), torch.ones(30, 100)
    first, second = Saved(), Saved([x.untyped_storage(), y.untyped_storage()])
    with first:
        total = (x * x).sum() + (y @ x).exp().sum()
    assert first.bytes == (100 + 30 * 100 + 30) * FLOATS
    with second:
        total = total + (x * x).sum() + (y @ x).exp().sum()
    assert second.bytes == 30 * FLOATS


def test_shared_memory_is_stored_once() -> None:
    x = torch.ones(100)
    assert stored([x, x[10:], x.detach(), torch.ones(7)], CPU) == 107 * FLOATS
    assert stored([x, torch.ones(3, device="meta")], torch.device("meta")) == 3 * FLOATS


def resident_bytes() -> float:
    """What this process has in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system tells no peak of a process's memory"
)
def test_the_peak_sees_what_was_allocated_during_the_call_alone() -> None:
    """By pages that the process never had, because an allocator may give out again what an earlier test has freed."""
    hundred, before = 100 * 2**20, []

    def touch_new_pages() -> None:
        before.append(resident_bytes())
        with mmap.mmap(-1, hundred) as pages:
            for start in range(0, hundred, mmap.PAGESIZE):
                pages[start] = 1

    high = peak(touch_new_pages, CPU)
    again = peak(lambda: None, CPU)
    assert high["host"] - before[0] > 0.9 * hundred
    assert again["host"] < high["host"] - 0.5 * hundred


def stepped(images: Batch, kind: Any, **options: Any) -> tuple[Step, Step]:
    """A step of the student alone, and one with a loss, both run before."""
    student, teacher = detector(), Teacher(detector(1, **options))
    losses = {"loss": kind(student.spec, teacher.spec)}
    steps = Step(Distiller(student), images), Step(Distiller(student, teacher, losses), images)
    for step in steps:
        step.run()
    return steps


@pytest.mark.parametrize("kind", [DeFeat, DSIG, SSIM, FGFI])
def test_a_steps_peak_is_that_of_its_parts(kind: Any, batch: Batch) -> None:
    found = measure_memory(*stepped(batch, kind))
    assert 0.9 * found.sum < found.peak < 1.05 * found.sum
    assert found.held > 0
    assert abs(found.spared) < 1000  # the terms themselves


@pytest.mark.parametrize("kind", [DeFeat, SSIM])
def test_a_teachers_pass_is_no_part_of_the_peak_once_it_is_known_what_is_read(kind: Any) -> None:
    large = DetectionData(Shapes(train=2, val=2, test=0, size=256), 2, workers=0, min_size=256, max_size=256)
    images: Any = next(iter(large.train_dataloader()))
    plain, step = stepped(images, kind, depth=18, width=0.5)
    found = measure_memory(plain, step)
    assert found.peak < 1.03 * found.sum
    view = step.module.teacher_view
    step.module.teacher_view = lambda x, seed, prefetch=(): view(x, seed)  # type: ignore[method-assign]
    later = measure_memory(plain, step)
    assert later.peak > 1.09 * later.sum


class Keeps(DistillLoss):
    """Reads the neck for its term, and keeps what it should not."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__({"x": 1.0})

    def keep(self, teacher: View, term: Tensor) -> None:
        raise NotImplementedError

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        term = sum((student.neck[stride] - x).square().mean() for stride, x in teacher.neck.items())
        assert isinstance(term, Tensor)
        self.keep(teacher, term)
        return {"x": term}


class KeepsNothing(Keeps):
    def keep(self, teacher: View, term: Tensor) -> None:
        pass


class KeepsMaps(Keeps):
    def keep(self, teacher: View, term: Tensor) -> None:
        self.maps = dict(teacher.body)


class KeepsView(Keeps):
    def keep(self, teacher: View, term: Tensor) -> None:
        self.view = teacher


class KeepsMapsInTheGraph(Keeps):
    """Until the backward pass is over."""

    def keep(self, teacher: View, term: Tensor) -> None:
        body = teacher.body
        term.register_hook(lambda gradient: gradient if body else None)


@pytest.mark.parametrize(
    ("kind", "kept"), [(KeepsNothing, ()), (KeepsMaps, "b"), (KeepsView, "n"), (KeepsMapsInTheGraph, "b")]
)
def test_what_a_loss_should_not_hold_is_found_to_the_byte(kind: Any, kept: str, batch: Batch) -> None:
    plain, step = stepped(batch, kind)
    view: Any = step.teacher_view()
    sizes = {
        "b": stored(view.body.values(), CPU),
        "n": stored(view.neck.values(), CPU),
        "i": stored([view.images], CPU),
    }
    found = measure_memory(plain, step)
    assert found.spared == pytest.approx(sum(sizes[each] for each in kept), abs=1000)


def test_a_folded_twin_shares_with_the_detector_what_it_does_not_change() -> None:
    teacher = Teacher(detector(1), channels_last=False)
    alone = stored(teacher.tensors().values(), CPU)
    assert alone == stored([*teacher.detector.parameters(), *teacher.detector.buffers()], CPU)
    twin = teacher.optimized(CPU)
    body: Any = twin.net.backbone
    folded = [layer for layer in body.modules() if isinstance(layer, nn.Conv2d)]
    changed = stored([each for layer in folded for each in layer.parameters()], CPU)
    assert alone < stored(teacher.tensors().values(), CPU) <= alone + changed
    plain = Teacher(detector(1), fold=False, channels_last=False)
    plain.optimized(CPU)
    assert stored(plain.tensors().values(), CPU) == alone
