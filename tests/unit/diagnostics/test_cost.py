"""Costs of a detector, and the row that joins them with its results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.diagnostics.cost import COST_COLUMNS, Cost, ModelRow, cost_of, measure_row, summarize
from distill.types import DistillError
from helpers.training import copy_weights, shapes_data, small_detector

CPU = torch.device("cpu")


def test_a_row_has_the_results_and_the_costs_of_the_model() -> None:
    detector, data = small_detector(), shapes_data()
    before = copy_weights(detector)
    row = measure_row("student", {"val/AP": 0.1234, "val/AP50": -1.0}, detector, data, CPU, images=3)
    assert row.cost is not None
    assert detector.training
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert row.cost.images == 3
    assert row.cost.images_per_second == pytest.approx(1000 / row.cost.milliseconds)
    assert row.cost.megabytes == pytest.approx(sum(4 * x.numel() for x in before.values()) / 1e6, rel=0.01)
    assert row.cost.device.endswith(("thread", "threads"))
    with FlopCounterMode(display=False) as counter:
        detector.eval().view(data.load_batch("val", [2]), training=False, frozen=True).neck  # noqa: B018
    assert counter.get_total_flops() < 1e9 * row.cost.gflops < 5 * counter.get_total_flops()
    assert cost_of(summarize(row.cost)) == row.cost
    assert row.cells(["val/AP", "val/AP50", "val/AP75"])[:4] == ["student", "12.3", "–", "–"]


def test_numbers_of_a_row_have_three_digits() -> None:
    cost = Cost(12.345, 81.004, 0.01684, 1234.4, 930_000, 5, "a processor")
    row = ModelRow("teacher", {}, cost)
    assert row.cells([]) == ["teacher", "12.3", "81", "0.0168", "1234", "0.93"]
    assert replace(row, cost=None).cells([]) == ["teacher", *"–" * len(COST_COLUMNS)]


def test_costs_that_were_not_measured_are_none() -> None:
    assert measure_row("student", {}, small_detector(), shapes_data(), CPU, images=0).cost is None
    assert summarize(None) is cost_of(None) is cost_of({"of another version": 1}) is None


def test_no_image_to_measure_is_refused() -> None:
    from distill.diagnostics.cost import measure_cost

    with pytest.raises(DistillError, match="at least one validation image"):
        measure_cost(small_detector(), shapes_data(), CPU, images=0)
