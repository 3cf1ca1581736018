"""Norms of gradients at the neck, against their closed form, and what a run logs of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.losses.defeat import DeFeat
from distill.training.callbacks.gradient_shares import GradientShares
from distill.training.callbacks.history import History
from distill.training.gradients import neck_gradient_norms, shares
from distill.types import DistillError
from helpers.training import distiller, fit


@pytest.mark.parametrize("maps", ["neck", "body"])
def test_norms_are_those_of_the_derivatives(maps: str) -> None:
    """At the neck, and at the body of a detector without a neck."""
    coarse, fine = torch.ones(1, 2, 2, 2, requires_grad=True), torch.full((1, 2, 4, 4), 3.0, requires_grad=True)
    spec = SimpleNamespace(outputs={"body", maps})
    student: Any = SimpleNamespace(**{maps: {8: fine, 16: coarse}}, spec=spec)
    terms = {
        "square": fine.square().sum(),  # derivative 6 at 32 places
        "both": fine.sum() + 2 * coarse.sum(),  # 1 at 32 places, 2 at 8
        "elsewhere": torch.ones(3, requires_grad=True).sum(),
        "constant": torch.tensor(5.0),
    }
    weights = {"square": 0.5, "both": -2.0, "elsewhere": 1.0, "constant": 1.0}
    norms = neck_gradient_norms(student, terms, weights)
    expected = {"square": 0.5 * 6 * math.sqrt(32), "both": 2 * math.sqrt(32 + 4 * 8), "elsewhere": 0.0, "constant": 0.0}
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(expected)
    total = sum(expected.values())
    assert {name: part.item() for name, part in shares(norms).items()} == pytest.approx(
        {name: value / total for name, value in expected.items()}
    )
    assert coarse.grad is None


def test_shares_without_any_gradient_are_zero() -> None:
    assert [part.item() for part in shares({"a": torch.zeros(()), "b": torch.zeros(())}).values()] == [0, 0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_logs_the_shares_at_the_interval(accumulate: int, tmp_path: Path) -> None:
    """Two batches an epoch. Shares are measured every second step, and only then."""
    fit(
        distiller(losses={"defeat": DeFeat}),
        tmp_path,
        max_epochs=4 * accumulate,
        accumulate_grad_batches=accumulate,
        max_steps=5,
        callbacks=[History(tmp_path), GradientShares(every=2)],
    )
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    parts = [[float(row[name]) for name in row if name.startswith("gradient/") and row[name]] for row in rows]
    names = {name for name in rows[1] if name.startswith("gradient/")}
    assert {name.replace("gradient/", "term/") for name in names} == {
        name for name in rows[1] if name.startswith("term/")
    }
    assert [bool(row) for row in parts] == [False, True, False, True, False]
    assert [sum(row) for row in parts if row] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_the_measurement_changes_no_weight(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [GradientShares(every=1)]):
        module = distiller(losses={"defeat": DeFeat})
        fit(module, tmp_path, max_epochs=1, callbacks=callbacks)
        weights.append(module.student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(DistillError, match="expected every from 1"):
        GradientShares(every=0)
