"""A term that cannot teach is reported once by name; a healthy term is not reported; a measurement changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses.defeat import DeFeat
from distill.training.callbacks.term_check import Measure, TermCheck, term_faults
from distill.training.distiller import Distiller
from distill.types import DistillError, View
from helpers.training import (
    FormulaLoss,
    assert_same,
    copy_weights,
    distiller,
    fit,
    sgd,
    shapes_data,
    small_detector,
    small_teacher,
)

Formula = Callable[[View, View], Tensor]
TERMS: dict[str, tuple[Formula, list[str]]] = {
    "healthy": (lambda s, t: (s.neck[8].mean() - 1).square(), []),
    "constant": (lambda s, t: s.neck[8].mean() * 1e-9 + 3.0, ["stays at 3"]),
    "cut_off": (lambda s, t: s.neck[8].detach().std(), ["has no gradient"]),
    "multiplied_by_zero": (lambda s, t: s.neck[8].detach().std() + s.neck[8].sum() * 0, ["has no gradient"]),
    "of_the_body_alone": (lambda s, t: s.body[32].mean().square(), []),
    "of_the_heads": (lambda s, t: s.objectness[8].mean().square(), []),
    "large": (lambda s, t: 1e4 * s.neck[8].std(), ["times the detection loss (callbacks.terms.times=100)"]),
    "silent": (lambda s, t: s.neck[8].detach().sum() * 0, ["stays at 0", "has no gradient"]),
}


def term_warnings(module: Distiller, folder: Path, **options: Any) -> list[str]:
    """The warnings about terms in a run of six steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, folder, shapes_data(train=24), max_epochs=1, **options)
    return [str(warning.message) for warning in caught if "the term " in str(warning.message)]


def test_each_fault_of_a_term_is_reported_once(tmp_path: Path) -> None:
    losses = {name: partial(FormulaLoss, formula=formula) for name, (formula, _) in TERMS.items()}
    module = distiller(losses={**losses, "defeat": DeFeat}, schedule=sgd(lr=0.0))
    messages = term_warnings(module, tmp_path, callbacks=[TermCheck(every=1, steps=3)])
    for name, (_, expected) in TERMS.items():
        of_term = [message for message in messages if message.startswith(f"the term {name}/term ")]
        assert len(of_term) == len(expected), name
        assert all(words in message for words, message in zip(expected, of_term, strict=True)), of_term
    assert len(messages) == sum(len(expected) for _, expected in TERMS.values())


def test_it_leaves_other_observers_alone(tmp_path: Path) -> None:
    module, seen = distiller(losses={"defeat": DeFeat}), []
    module.observers.append(lambda *_: seen.append(1))
    (other,) = module.observers
    term_warnings(module, tmp_path, callbacks=[TermCheck(every=1, steps=3)])
    assert len(seen) == 6
    assert module.observers == [other]


def test_a_fault_must_persist(tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes(student: View, teacher: View) -> Tensor:
        calls.append(1)
        value = student.neck[8].std()
        return value if len(calls) % 3 == 0 else value.detach()

    module = distiller(losses={"formula": partial(FormulaLoss, formula=sometimes)})
    assert term_warnings(module, tmp_path, callbacks=[TermCheck(every=1, steps=3)]) == []


def test_a_term_that_does_not_count_is_passed_over(tmp_path: Path) -> None:
    module = distiller(losses={"defeat": partial(DeFeat, ramp={"stop": 99})})
    assert term_warnings(module, tmp_path, callbacks=[TermCheck(every=1, steps=2, times=1e-9)]) == []


def test_measuring_changes_nothing_and_is_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **named: Any) -> Any:
        looks.append(args)
        return grad(*args, **named)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    ends = []
    for callbacks in ([], [TermCheck(every=4, steps=4)]):
        module = distiller(small_detector(norm="batch"), small_teacher(), {"defeat": DeFeat})
        fit(module, tmp_path, shapes_data(train=24), max_epochs=1, callbacks=callbacks, accumulate_grad_batches=1)
        ends.append(copy_weights(module))
    assert_same(*ends)
    assert len(looks) == 2 * 2  # two terms, in steps 0 and 4


def test_faults_of_single_measures() -> None:
    fine = [Measure(1.0, 2.0, 5.0, 1.0), Measure(1.1, 2.2, 0.0, 1.0)]
    assert term_faults(fine, 100) == {}
    assert list(term_faults([Measure(1.0, 2.0, 5.0, 1.0), Measure(1.0 + 1e-7, 2.0, 0.0, 1.0)], 100)) == ["constant"]
    assert list(term_faults(fine, 1.9)) == ["size"]
    assert term_faults([*fine, Measure(float("nan"), float("nan"), float("nan"), 1.0)], 1.9) == {}


@pytest.mark.parametrize("options", [{"every": 0}, {"steps": 0}, {"times": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match=r"callbacks\.terms=null"):
        TermCheck(**options)
