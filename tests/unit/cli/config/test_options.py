"""Options of the configuration from Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import distill
from distill.data.shapes import Shapes
from distill.types import DistillError


def test_a_model_by_its_name() -> None:
    student = distill.model("frcnn_r10_mini", ["cat", "dog"], min_size=64, max_size=96)
    assert student.classes == ("cat", "dog")
    assert (student.options["min_size"], student.options["max_size"]) == (64, 96)
    assert student.options["backbone"]["depth"] == 10
    thin = distill.model("frcnn_r10_mini", ["cat", "dog"], backbone={"width": 0.125}, neck_channels=16)
    assert (thin.options["backbone"]["depth"], thin.options["backbone"]["width"]) == (10, 0.125)
    assert thin.parameters_count < student.parameters_count


def test_a_schedule_by_its_name() -> None:
    assert distill.schedule("sgd_2x").epochs == 24
    short = distill.schedule("shapes", epochs=3)
    assert (short.epochs, short.shape, short.clip) == (3, "one_cycle", 10.0)


def test_a_schedule_that_depends_on_the_data() -> None:
    data = distill.DetectionData(Shapes(train=40, val=2, test=0, size=64), batch_size=4, workers=0)
    fresh, trained = distill.schedule("auto", data), distill.schedule("auto", data, trained=True, epochs=5)
    assert fresh.epochs * 10 >= 1000
    assert trained.epochs == 5
    rates = [each.optimizer([pytest.importorskip("torch").nn.Parameter()]).defaults["lr"] for each in (fresh, trained)]
    assert rates[0] > rates[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distill.model("frcnn_r5", ["cat"]), "frcnn_r50"),
        (lambda: distill.model("base", ["cat"]), "no option 'base'"),
        (lambda: distill.model("frcnn_r10_mini", ["cat"], widht=1), "widht"),
        (lambda: distill.schedule("sgd_3x"), "sgd_2x"),
        (lambda: distill.schedule("auto"), "needs the data"),
        (lambda: distill.schedule("shapes", epochs=0), "epochs"),
    ],
)
def test_a_mistake_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        call()
