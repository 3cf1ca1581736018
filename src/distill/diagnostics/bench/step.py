"""A training step that can be taken apart: what the losses read of their teachers, their adapters, what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.diagnostics.memory import Saved
from distill.frozen import FrozenModel, frozen_models
from distill.training.distiller import Distiller, weighted
from distill.types import Batch, View

SEED = 0
"""Of all draws in the step."""
PROGRESS = 0.5
"""Part of the training that is done, by which ramps scale the weights. At its middle most ramps are not at 0."""


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
    """A training step of a Distiller on one batch, whole and in parts. The learning rate is 0, so that no weight changes.

    Args:
        module: student, and teacher and losses where the step has them.
        batch: on its device.
        autocast: opens the precision of the run.
    """

    def __init__(
        self, module: Distiller, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.module, self.batch, self.autocast = module.to(batch.images.device), batch, autocast
        self.student, self.teacher, self.losses = module.student, module.teacher, module.losses
        self.optimizer, _ = module.schedule.build(self.student, self.losses, 1, len(batch))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, between: Callable[[], object] = float) -> None:
        """Forward, backward, optimiser; `between` is called between forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.module.compute_step(self.batch, SEED, PROGRESS).loss
        between()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def supervised(self, student: View) -> Tensor:
        """The weighted sum of the student's own terms."""
        return weighted(*self.module.supervised_terms(student))

    def distilled(self, student: Any, teacher: Any) -> Tensor:
        """The weighted sum of all terms of the losses."""
        return weighted(*self.module.distillation_terms(student, teacher, PROGRESS))

    def student_view(self) -> View:
        """A new View of the student, with the draws of the step."""
        return self.student.view(self.batch, training=True, seed=SEED)

    def teacher_view(self) -> View | None:
        """A new View of the teacher, with the draws of the step and nothing prefetched."""
        return self.module.teacher_view(self.batch, SEED)

    def teach(self, mark: Callable[[], Any] = float) -> tuple[Read, Read]:
        """Let the losses read, for the marks alone, nothing is trained: what they read of all that teaches, and of the student."""
        theirs, ours = Read(), Read()
        if self.losses:
            with torch.no_grad(), self.autocast(), _watched_guests(self.losses, mark, theirs):
                teacher: Any = self.teacher_view()
                watched = None if teacher is None else Watched(teacher, mark, theirs)
                self.distilled(Watched(self.student_view(), float, ours), watched)
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
            student = self.student_view()
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
            student = self.student_view()
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
