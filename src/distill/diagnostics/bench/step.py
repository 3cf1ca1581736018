"""A training step that the bench runs as a whole and in parts.

The parts are the stages that the losses read, the losses' adapters, and the memory that the losses keep.
"""

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
"""Seed of all random draws in the step."""
PROGRESS = 0.5
"""Finished share of the training. Ramps scale the weights by it; few ramps are 0 in the middle of the training."""


@dataclass
class StageReads:
    """The recorded reads of a View."""

    stages: list[str] = field(default_factory=list)
    """Names of the stages that were read, each once."""
    spans: list[tuple[Any, Any]] = field(default_factory=list)
    """Marks before and after each read."""


class WatchedView:
    """A View or a frozen model of a loss that records every read, with a `mark` before and after the read."""

    def __init__(self, view: View | FrozenModel, mark: Callable[[], Any], reads: StageReads) -> None:
        self._view, self._mark, self._reads = view, mark, reads

    def __getattr__(self, name: str) -> Any:
        with self._recorded(name):
            value = getattr(self._view, name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            with self._recorded(name):
                return value(*args, **options)

        return call

    @contextmanager
    def _recorded(self, name: str) -> Iterator[None]:
        if name not in self._reads.stages:
            self._reads.stages.append(name)
        start = self._mark()
        yield
        self._reads.spans.append((start, self._mark()))


@contextmanager
def _watched_models(losses: nn.Module, mark: Callable[[], Any], reads: StageReads) -> Iterator[None]:
    """Record the reads of the losses' frozen models, such as an image classifier."""
    models = [
        (vars(module), name, value)
        for module in losses.modules()
        for name, value in vars(module).items()
        if isinstance(value, FrozenModel)
    ]
    try:
        for attributes, name, model in models:
            attributes[name] = WatchedView(model, mark, reads)
        yield
    finally:
        for attributes, name, model in models:
            attributes[name] = model


class Step:
    """A training step of a Distiller on one batch, as a whole and in parts.

    The learning rate is 0, so that no weight changes.

    Args:
        module: a Distiller with a student, and with a teacher and losses if the step has them. The module is moved to
            the batch's device.
        batch: the batch, on the measured device.
        autocast: returns the autocast context of the run's precision.
    """

    def __init__(
        self, module: Distiller, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.module, self.batch, self.autocast = module.to(batch.images.device), batch, autocast
        self.student, self.teacher, self.losses = module.student, module.teacher, module.losses
        self.optimizer, _ = module.schedule.build_optimizer(self.student, self.losses, 1, len(batch))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, between: Callable[[], object] = float) -> None:
        """Run the forward pass, `between`, the backward pass and the optimizer step, in this order."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.module.compute_step(self.batch, SEED, PROGRESS).loss
        between()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def supervised(self, student: View) -> Tensor:
        """Return the weighted sum of the student's own terms."""
        return weighted(*self.module.supervised_terms(student))

    def distilled(self, student: Any, teacher: Any) -> Tensor:
        """Return the weighted sum of the terms of all distillation losses."""
        return weighted(*self.module.distillation_terms(student, teacher, PROGRESS))

    def student_view(self) -> View:
        """Create a new View of the student, with the random draws of the step."""
        return self.student.view(self.batch, training=True, seed=SEED)

    def teacher_view(self) -> View | None:
        """Create a new View of the teacher, with the random draws of the step and without prefetched stages."""
        return self.module.teacher_view(self.batch, SEED)

    def record_reads(self, mark: Callable[[], Any] = float) -> tuple[StageReads, StageReads]:
        """Compute the losses without gradients. Return their reads of the teachers, and their reads of the student.

        The teachers are the teacher and the losses' frozen models. Only the spans of their reads come from `mark`.
        """
        teacher_reads, student_reads = StageReads(), StageReads()
        if self.losses:
            with torch.no_grad(), self.autocast(), _watched_models(self.losses, mark, teacher_reads):
                teacher: Any = self.teacher_view()
                watched = None if teacher is None else WatchedView(teacher, mark, teacher_reads)
                self.distilled(WatchedView(self.student_view(), float, student_reads), watched)
        return teacher_reads, student_reads

    def adapter_passes(self) -> Callable[[], None]:
        """Return a function that runs the forward and backward pass of each layer that the losses train.

        The inputs of the layers are those in the step.
        """
        return self._passes(self.losses)

    def recompute_passes(self) -> Callable[[], None]:
        """Return a function that runs the forward and backward pass of each student layer that the losses recompute.

        An example is the head on the teacher's RoIs. The inputs of the layers are those in the step.
        """
        return self._passes(self.student)

    def _passes(self, module: nn.Module) -> Callable[[], None]:
        calls: list[tuple[nn.Module, tuple[Any, ...]]] = []

        def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls.append((layer, tuple(_leaf(x) for x in inputs)))

        layers = [layer for layer in module.modules() if any(p.requires_grad for p in layer.parameters(False))]
        with self.autocast():
            student = self.student_view()
            self.supervised(student)
            hooks = [layer.register_forward_pre_hook(record) for layer in layers]
            self.distilled(student, self.teacher_view())
        for hook in hooks:
            hook.remove()

        def run() -> None:
            with self.autocast():
                outputs = [layer(*inputs) for layer, inputs in calls]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            for layer, inputs in calls:
                layer.zero_grad(set_to_none=True)
                for x in inputs:
                    x.grad = None

        return run if calls else _nothing

    def trained_tensors(self) -> list[Tensor]:
        """Return the weights and buffers of the student and the losses, and the optimizer's state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*_tensors(self.student, self.losses), *(value for value in states if isinstance(value, Tensor))]

    def teacher_tensors(self) -> list[Tensor]:
        """Return the weights and buffers of the teacher and of the losses' frozen models, with all copies in memory."""
        teachers = [*frozen_models(self.losses), *([self.teacher] if self.teacher and self.losses else [])]
        return [tensor for teacher in teachers for tensor in teacher.tensors().values()]

    def kept_bytes(self) -> float:
        """Return the bytes that the losses keep for the backward pass, besides those of the student's own terms."""
        own = Saved()
        with self.autocast(), own:
            student = self.student_view()
            total = self.supervised(student)
        weights = [tensor.untyped_storage() for tensor in _tensors(self.student, self.losses)]
        added = Saved([*own.pieces, *weights])
        with self.autocast(), added:
            total = total + self.distilled(student, self.teacher_view())
        return added.bytes


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _leaf(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _nothing() -> None:
    pass
