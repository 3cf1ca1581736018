"""Warns of distillation terms that are constant, have no gradient, or are far larger than the detection loss."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from distill.training.distiller import Distiller
from distill.training.gradients import trained_maps
from distill.types import DistillError, View

GRADIENT_FACTOR = 2.0**16
"""Factor on a gradient that is only compared with 0, against underflow in half precision."""


class Measure(NamedTuple):
    """One term at one step."""

    value: float
    """Unweighted value."""
    loss: float
    """Weighted value, as in the total loss."""
    gradient: float
    """Largest entry of its gradient on the student's maps, times `GRADIENT_FACTOR`."""
    detection: float
    """Sum of the student's own weighted terms."""


class TermCheck(L.Callback):
    """Measures every distillation term at an interval, and warns once of each problem that persists.

    * constant: the values differ by less than a millionth;
    * without a gradient: the term reaches no map of the student's body or neck;
    * too large: the weighted value is more than ``times`` the student's own loss.

    A measurement costs one backward pass per term down to the maps. It changes no weights, no random draws and no
    gradients of the training. Terms with a ramp at 0 are skipped. With several processes the batches of the first one
    are measured.

    Args:
        every: steps between two measurements.
        steps: steps that a problem must persist. A short run is measured more often, so that the check speaks after a
            quarter of the run, but not before 10 steps.
        times: maximum ratio of a weighted term to the detection loss.

    Raises:
        DistillError: ``every`` or ``steps`` below 1, ``times`` not above 0.
    """

    def __init__(self, every: int = 50, steps: int = 500, times: float = 100.0) -> None:
        if every < 1 or steps < 1 or not times > 0:
            raise DistillError(
                f"callbacks.terms: expected every and steps of at least 1 and times above 0, got every={every}, "
                f"steps={steps}, times={times}; callbacks.terms=null switches it off"
            )
        self.every, self.steps, self.times = every, steps, times
        self._history: dict[str, deque[Measure]] = {}
        self._warned: set[tuple[str, str]] = set()
        self._measured_step = -1
        self._latest: tuple[list[str], Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Register an observer, which gets the terms while their graph exists."""
        assert isinstance(pl_module, Distiller)
        self._fit_to(int(trainer.estimated_stepping_batches))

        def observe(student: View, terms: dict[str, Tensor], weights: dict[str, float]) -> None:
            step = trainer.global_step
            if step % self._interval == 0 and step != self._measured_step:
                self._measured_step = step
                self._latest = measure_terms(student, terms, weights)

        self._observe = observe
        pl_module.observers.append(observe)

    def _fit_to(self, planned: int) -> None:
        """Shorten the interval and the window for a run of this number of steps."""
        self._window = min(self.steps, max(10, planned // 4))
        self._interval = self.every if self._window == self.steps else min(self.every, max(1, self._window // 5))
        room = max(2, math.ceil(self._window / self._interval))
        self._history = defaultdict(lambda: deque(maxlen=room))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Read the last measurement, and warn of problems."""
        if self._latest is None:
            return
        (names, rows), self._latest = self._latest, None
        for gone in self._history.keys() - set(names):
            del self._history[gone]
        for name, row in zip(names, rows.tolist(), strict=True):
            self._history[name].append(Measure(*row))
            if len(self._history[name]) == self._history[name].maxlen:
                self._warn(name, term_faults(self._history[name], self.times))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the observer."""
        assert isinstance(pl_module, Distiller)
        pl_module.observers.remove(self._observe)

    def _warn(self, name: str, problems: Mapping[str, str]) -> None:
        for kind, words in problems.items():
            if (name, kind) not in self._warned:
                self._warned.add((name, kind))
                rank_zero_warn(f"the term {name} {words}, over the last {self._window} steps")


def measure_terms(student: View, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[list[str], Tensor]:
    """Names of the distillation terms with a weight at this step, and one row of `Measure` per term, on the device."""
    maps = trained_maps(student)
    own = [weights[name] * terms[name].detach() for name in terms if name.startswith("student/")]
    detection = torch.stack(own).sum()
    names = [name for name in terms if not name.startswith("student/") and weights[name]]
    rows = [
        torch.stack(
            [terms[name].detach(), weights[name] * terms[name].detach(), largest_gradient(terms[name], maps), detection]
        )
        for name in names
    ]
    return names, torch.stack([row.double() for row in rows]) if rows else torch.zeros(0, len(Measure._fields))


def largest_gradient(term: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Largest entry of a term's gradient on the maps, times `GRADIENT_FACTOR`."""
    if not term.requires_grad:
        return term.detach().new_zeros(())
    gradients = torch.autograd.grad(
        term, list(maps), torch.full_like(term, GRADIENT_FACTOR), retain_graph=True, allow_unused=True
    )
    sizes = [gradient.abs().amax().to(term.dtype) for gradient in gradients if gradient is not None]
    return torch.stack(sizes).amax() if sizes else term.detach().new_zeros(())


def term_faults(measured: Sequence[Measure], times: float) -> dict[str, str]:
    """Kind of problem -> description, for problems in all measurements of a term."""
    values = [measure.value for measure in measured]
    problems = {}
    if max(values) - min(values) <= 1e-6 * max(map(abs, values)):
        problems["constant"] = f"stays at {values[-1]:.6g}: it does not depend on the images, or has nothing to compare"
    if all(measure.gradient == 0 for measure in measured):
        problems["gradient"] = (
            "has no gradient on the student's maps: it is cut off from the student, or its mask is always empty"
        )
    if all(abs(measure.loss) > times * abs(measure.detection) for measure in measured):
        ratio = abs(measured[-1].loss) / max(abs(measured[-1].detection), 1e-30)
        problems["size"] = (
            f"is {ratio:.3g} times the detection loss (callbacks.terms.times={times:g}): lower its weight, or compare "
            "with the paper's weights for this detector"
        )
    return problems
