"""A training step that can be taken apart: what the losses read of their teachers, their adapters, what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.detectors.base import Detector
from distill.diagnostics.memory import Saved
from distill.frozen import FrozenModel, frozen_models
from distill.losses.base import DistillLoss
from distill.teacher import DEFAULT_PREFETCH, Teacher
from distill.training.schedule import Schedule
from distill.types import Batch, View


@dataclass
class Read:
    """What losses read of their teachers: each stage by name, once, and the marks before and after each reading."""

    stages: list[str] = field(default_factory=list)
    spans: list[tuple[Any, Any]] = field(default_factory=list)


class Watched:
    """A View, or a loss's own guest, that notes in `read` what is read of it, with a `mark` before and after."""

    def __init__(self, view: View | FrozenModel, mark: Callable[[], Any], read: Read) -> None:
        self._view, self._mark, self._read = view, mark, read

    def __getattr__(self, name: str) -> Any:
        with self._clocked(name):
            value = getattr(self._view, name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            with self._clocked(name):
                return value(*args, **options)

        return call

    @contextmanager
    def _clocked(self, name: str) -> Iterator[None]:
        if name not in self._read.stages:
            self._read.stages.append(name)
        start = self._mark()
        yield
        self._read.spans.append((start, self._mark()))


@contextmanager
def _watched_guests(losses: nn.Module, mark: Callable[[], Any], read: Read) -> Iterator[None]:
    """While open, the guests that losses keep for themselves are watched."""
    found = [
        (vars(module), name, each)
        for module in losses.modules()
        for name, each in vars(module).items()
        if isinstance(each, FrozenModel)
    ]
    try:
        for holder, name, guest in found:
            holder[name] = Watched(guest, mark, read)
        yield
    finally:
        for holder, name, guest in found:
            holder[name] = guest


class Step:
    """A student's training step on one batch, with some losses or none. The weights stay: the learning rate is 0.

    Args:
        student: the detector.
        teacher: the guest, where losses need one.
        losses: by name.
        batch: on its device.
        schedule: of the optimiser.
        autocast: opens the precision of the run.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Teacher | None,
        losses: Mapping[str, DistillLoss],
        batch: Batch,
        schedule: Schedule,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.student, self.teacher, self.batch, self.autocast = student, teacher, batch, autocast
        self.losses: Any = nn.ModuleDict(losses).to(batch.images.device)
        self._prefetch: Sequence[str] = DEFAULT_PREFETCH
        self.optimizer, _ = schedule.build(student, self.losses, 1, len(batch))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, between: Callable[[], object] = float) -> None:
        """Forward, backward, optimiser; `between` is called between forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            teacher = self.teacher_view(self._prefetch)
            student = self.student.view(self.batch, seed=0)
            total = self.supervised(student) + self.distilled(student, teacher)
            self._prefetch = teacher.stages if teacher else ()
            del student, teacher
        between()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def supervised(self, student: View) -> Tensor:
        """The sum of the student's own terms."""
        return sum(student.losses.values(), start=torch.zeros((), device=self.batch.images.device))

    def distilled(self, student: Any, teacher: Any) -> Tensor:
        """The weighted sum of all terms of the losses."""
        terms = [
            loss.weights[name] * value
            for loss in self.losses.values()
            for name, value in loss(student, teacher).items()
        ]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.batch.images.device)

    def teacher_view(self, prefetch: Sequence[str] = ()) -> View | None:
        """A fresh View of the teacher."""
        return (
            None
            if self.teacher is None or not self.losses
            else self.teacher.view(self.batch, seed=1, prefetch=prefetch)
        )

    def teach(self, mark: Callable[[], Any] = float) -> tuple[Read, Read]:
        """Let the losses read, for the marks alone, nothing is trained: what they read of all that teaches, and of the student."""
        theirs, ours = Read(), Read()
        if self.losses:
            with torch.no_grad(), self.autocast(), _watched_guests(self.losses, mark, theirs):
                teacher: Any = self.teacher_view()
                watched = None if teacher is None else Watched(teacher, mark, theirs)
                self.distilled(Watched(self.student.view(self.batch, seed=0), float, ours), watched)
        return theirs, ours

    def adapters(self) -> Callable[[], None]:
        """Forward and backward of each layer that the losses train, on the inputs that it has in a step."""
        return self._replay(self.losses)

    def again(self) -> Callable[[], None]:
        """Forward and backward of each of the student's layers that runs for the losses alone, as for the teacher's regions."""
        return self._replay(self.student)

    def _replay(self, within: nn.Module) -> Callable[[], None]:
        calls: list[tuple[nn.Module, tuple[Any, ...]]] = []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls.append((module, tuple(_leaf(each) for each in inputs)))

        layers = [layer for layer in within.modules() if any(p.requires_grad for p in layer.parameters(False))]
        with self.autocast():
            student = self.student.view(self.batch, seed=0)
            self.supervised(student)
            hooks = [layer.register_forward_pre_hook(note) for layer in layers]
            self.distilled(student, self.teacher_view())
        for hook in hooks:
            hook.remove()

        def replay() -> None:
            with self.autocast():
                outputs = [layer(*inputs) for layer, inputs in calls]
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
            for layer, inputs in calls:
                layer.zero_grad(set_to_none=True)
                for each in inputs:
                    each.grad = None

        return replay if calls else _nothing

    def trained(self) -> list[Tensor]:
        """Weights and buffers of the student and the losses, and the optimiser's state of them."""
        states = [each for state in self.optimizer.state.values() for each in state.values()]
        return [*_tensors(self.student, self.losses), *(each for each in states if isinstance(each, Tensor))]

    def taught(self) -> list[Tensor]:
        """Weights and buffers of all that teaches, in all forms in which they lie in memory."""
        teachers = [*frozen_models(self.losses), *([self.teacher] if self.teacher and self.losses else [])]
        return [tensor for teacher in teachers for tensor in teacher.tensors().values()]

    def held(self) -> float:
        """Bytes that the losses keep for the backward pass and that the student's own terms do not."""
        own = Saved()
        with self.autocast(), own:
            student = self.student.view(self.batch, seed=0)
            total = self.supervised(student)
        weights = [each.untyped_storage() for each in _tensors(self.student, self.losses)]
        more = Saved([*own.pieces, *weights])
        with self.autocast(), more:
            total = total + self.distilled(student, self.teacher_view())
        return more.bytes


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [each for module in modules for each in (*module.parameters(), *module.buffers())]


def _leaf(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _nothing() -> None:
    pass
