"""Weights from gradients: the factors against their closed form, what a run does with them, and exact resumes."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses.defeat import DeFeat
from distill.losses.pkd import PKD
from distill.training.balance import LARGEST_FACTOR, GradientBalance
from distill.training.callbacks.checkpoints import LastCheckpoint
from distill.training.callbacks.gradient_shares import GradientShares
from distill.training.callbacks.history import History
from distill.training.checkpoint_io import CheckpointFiles
from distill.training.gradients import neck_gradient_norms
from distill.types import DistillError, View
from helpers.training import FormulaLoss, assert_same, distiller, fit, half_precision


def view(value: float = 1.0, **maps: Any) -> Any:
    x = torch.full((1, 1, 2, 2), value, requires_grad=True)  # four elements: a slope of 1 has a norm of 2
    return SimpleNamespace(**(maps or {"neck": {8: x}}), spec=SimpleNamespace(outputs=set(maps or {"neck": 0}))), x


def measured(balance: GradientBalance, detection: float, **slopes: float) -> None:
    student, x = view()
    balance.measure(student, detection * x.sum(), {name: slope * x.sum() for name, slope in slopes.items()})


def test_a_factor_gives_the_share() -> None:
    """Over two batches: 0.5 * (2*4 + 2*8) / (2*1 + 2*2) = 2, and 0.5 * 24 / (2*30 + 2*10) = 0.15."""
    balance = GradientBalance(share=0.5, steps=2)
    measured(balance, 4.0, pkd=1.0, dist=30.0)
    measured(balance, -8.0, pkd=2.0, dist=10.0)
    assert balance.factors(["pkd", "dist"]) == pytest.approx({"pkd": 1.0, "dist": 0.15})  # not yet fixed: at most 1
    balance.finished_steps = 2
    assert balance.factors(["pkd", "dist"]) == pytest.approx({"pkd": 2.0, "dist": 0.15})
    by_name = GradientBalance(share={"pkd": 0.1, "dist": 2.0}, steps=2)
    by_name.load_state_dict(balance.state_dict())
    assert by_name.factors(["pkd", "dist"]) == pytest.approx({"pkd": 0.4, "dist": 0.6})


def test_a_loss_scale_keeps_gradients_that_fp16_would_lose() -> None:
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    student: Any = SimpleNamespace(neck={8: x.half()}, spec=SimpleNamespace(outputs={"neck"}))
    term = 1e-9 * student.neck[8].float().sum()
    found = [neck_gradient_norms(student, {"a": term}, {"a": 1.0}, scale)["a"].item() for scale in (1.0, 2.0**16)]
    assert found == [0.0, pytest.approx(2e-9, rel=1e-2)]


def test_a_method_without_a_gradient_keeps_its_weights_and_causes_a_warning() -> None:
    balance = GradientBalance(steps=1)
    measured(balance, 4.0, pkd=0.0)
    assert balance.factor("pkd") == 1.0
    with pytest.warns(UserWarning, match="pkd had no gradient at the student's neck in 1 steps"):
        balance.end_step(["pkd"])


def test_a_tiny_gradient_causes_no_arbitrary_weight() -> None:
    balance = GradientBalance(steps=1)
    measured(balance, 4.0, pkd=1e-20)
    assert balance.factor("pkd") == 1.0
    with pytest.warns(UserWarning, match="more than 1000 times higher"):
        balance.end_step(["pkd"])
    assert balance.factor("pkd") == LARGEST_FACTOR


def test_without_a_detection_loss_all_weights_stay() -> None:
    balance = GradientBalance(steps=1)
    measured(balance, 0.0, pkd=2.0)
    assert balance.factor("pkd") == 1.0
    with pytest.warns(UserWarning, match="the detection loss had no finite gradient"):
        balance.end_step(["pkd"])


def test_a_batch_that_is_not_finite_is_not_counted() -> None:
    balance = GradientBalance(share=1.0)
    measured(balance, 1.0, pkd=4.0)
    measured(balance, math.nan, pkd=1.0)
    measured(balance, 4.0, pkd=math.inf)
    assert balance.factor("pkd") == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "balance_share: expected a number above 0"),
        ({"share": {"pkd": -1.0}}, "balance_share: expected a number above 0"),
        ({"share": {}}, "balance_share: expected a number above 0"),
        ({"share": "much"}, "balance_share: expected a number above 0"),
        ({"steps": 0}, "balance_steps: expected a whole number from 1"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        GradientBalance(**options)


def test_shares_of_other_methods_are_refused() -> None:
    with pytest.raises(DistillError, match="expected a share for each of defeat"):
        distiller(losses={"defeat": DeFeat}, balance=GradientBalance({"pkd": 1.0}))


def mean_square(student: View, teacher: View, scale: float) -> Tensor:
    return scale * torch.stack([x.square().mean() for x in student.neck.values()]).mean()


def formula(scale: float, weight: float = 1.0) -> Callable[..., FormulaLoss]:
    return partial(FormulaLoss, formula=partial(mean_square, scale=scale), weight=weight)


def balanced(**options: Any) -> Any:
    return distiller(losses={"a": formula(1e4), "b": formula(1e8)}, balance=GradientBalance(**options))


def test_a_run_starts_and_goes_on_with_the_share_and_logs_it(tmp_path: Path) -> None:
    """In the first step the share is exact; after the last measured step the factors no longer change."""
    fit(
        balanced(share=0.5, steps=2),
        tmp_path,
        max_steps=4,
        callbacks=[History(tmp_path), GradientShares(every=1)],
    )
    rows = [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader((tmp_path / "steps.csv").open())]
    detection = sum(rows[0][name] for name in rows[0] if name.startswith("gradient/student/"))
    assert rows[0]["gradient/a/term"] == pytest.approx(rows[0]["gradient/b/term"], rel=1e-4)
    assert rows[0]["gradient/a/term"] <= 0.5 * detection + 1e-6  # the norm of a sum is at most the sum of the norms
    factors = [(row["balance/a"], row["balance/b"]) for row in rows]
    assert factors[0] != factors[1]
    assert factors[1] == factors[2] == factors[3]
    assert all(a == pytest.approx(1e4 * b, rel=1e-4) for a, b in factors)
    for row, (a, _) in zip(rows, factors, strict=True):
        assert row["loss/a/term"] == pytest.approx(a * row["term/a/term"], rel=1e-5)


def test_a_training_that_ends_before_the_factors_are_fixed_causes_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the training has 1 steps, fewer than distill.balance_steps=2"):
        fit(balanced(steps=2), tmp_path, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="distill.balance")
        fit(balanced(steps=1), tmp_path, max_steps=1)


def test_a_ramp_scales_the_balanced_weights(tmp_path: Path) -> None:
    """The norms are those without the ramp, so a warm-up from 0 changes no factor."""
    found = {}
    for name, ramp in {"constant": {}, "warm-up": {"ramp": {"warmup": 4.0}}}.items():
        module = distiller(losses={"pkd": partial(PKD, **ramp)}, balance=GradientBalance(steps=1))
        fit(module, tmp_path, max_steps=1)
        found[name] = module.balance.state_dict(), module.last_batch.weights["pkd/neck.all"]
    assert found["warm-up"][0] == found["constant"][0]
    assert found["warm-up"][1] == 0.0 < found["constant"][1]


def test_without_terms_nothing_changes(tmp_path: Path) -> None:
    """Weights of zero and a ramp at zero give the student alone, bit for bit."""
    silent = partial(DeFeat, **{place: {"foreground": 0.0, "background": 0.0} for place in ("neck", "backbone")})
    off = partial(DeFeat, ramp={"stop": 99})
    students = []
    for losses in ({}, {"defeat": silent}, {"defeat": off}):
        module = distiller(losses=losses, balance=GradientBalance(steps=2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a method without terms is not balanced
            fit(module, tmp_path, max_epochs=1)
        students.append(module.student.state_dict())
    assert_same(students[0], students[1])
    assert_same(students[0], students[2])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resume_goes_on_with_the_same_factors(accumulate: int, tmp_path: Path) -> None:
    """Two batches an epoch. The run stops after its first epoch, before the last measured step."""
    steps = 3 // accumulate + 1
    whole, first, second = (balanced(steps=steps) for _ in range(3))
    options = {"accumulate_grad_batches": accumulate, "plugins": [CheckpointFiles()]}
    for module, epochs, file in ((whole, 3, None), (first, 1, None), (second, 3, tmp_path / "last.ckpt")):
        last = [LastCheckpoint(tmp_path)] if module is first else []
        fit(module, tmp_path, max_epochs=epochs, ckpt_path=file, enable_checkpointing=True, callbacks=last, **options)
    assert 0 < first.balance.finished_steps < steps == second.balance.finished_steps
    assert second.balance.state_dict() == whole.balance.state_dict()
    assert_same(whole.student.state_dict(), second.student.state_dict())


def test_half_precision_measures_the_same_norms(tmp_path: Path) -> None:
    factors = []
    for plugins in ([], [half_precision(2.0**10)]):
        module = distiller(losses={"a": formula(10.0)}, balance=GradientBalance(steps=1))
        fit(module, tmp_path, max_steps=1, plugins=plugins)
        factors.append(module.balance.factor("a"))
    assert factors[1] == pytest.approx(factors[0], rel=0.05) != 1.0
