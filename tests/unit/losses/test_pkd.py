"""PKD: Pearson's coefficient by numpy, the published form with its epsilon, and pairs of unequal size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.pkd import PKD, correlation_errors, equally_large
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, OracleOfTwins


def slow_standardized(x: Tensor) -> np.ndarray[Any, Any]:
    values = x.detach().double().numpy()
    out = np.empty_like(values)
    for channel in range(values.shape[1]):
        row = values[:, channel].ravel()
        mean = sum(row) / len(row)
        deviation = (sum((v - mean) ** 2 for v in row) / max(1, len(row) - 1)) ** 0.5
        out[:, channel] = (values[:, channel] - mean) / (deviation + 1e-6)
    return out


def slow_error(student: Tensor, teacher: Tensor) -> float:
    return float(((slow_standardized(student) - slow_standardized(teacher)) ** 2).mean() / 2)


class TestPKD(OracleOfTwins):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return PKD(student, teacher, neck={"levels": None}, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return PKD(student, teacher, adapter={"kernel": 1})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        return {"neck.all": sum(slow_error(x, teacher.neck[at]) for at, x in student.neck.items())}

    def test_a_wrong_shape_is_refused(self) -> None:
        """Maps of unequal size are resized, see below."""
        student, teacher = self.views(OBJECTS)
        narrow = student.mapped(lambda x: x[..., :-1] if x.shape[-1] > 1 else x)
        (value,) = self.loss(student.spec, teacher.spec)(narrow, teacher).values()
        assert value.isfinite()


def test_is_one_minus_pearson() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7).double(), torch.randn(2, 3, 5, 7).double()
    ((total, count),) = correlation_errors([(student, teacher)])
    rows = [x.transpose(0, 1).flatten(1).numpy() for x in (student, teacher)]
    pearson = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*rows, strict=True)])
    assert (total / count).item() == pytest.approx(69 / 70 * (1 - pearson), rel=1e-5)  # the epsilon


def test_scale_and_offset_of_a_channel_do_not_count() -> None:
    student, teacher = random_view(batch(OBJECTS), spec(), 1), random_view(batch(OBJECTS), spec(), 2)
    scales, offsets = torch.arange(1.0, 7).view(1, 6, 1, 1), torch.arange(6.0).view(1, 6, 1, 1)
    loss = PKD(spec(), spec())
    before = loss(student, teacher)["neck.all"].item()
    assert loss(student.mapped(lambda x: x * scales + offsets if x.shape[1] == 6 else x), teacher)[
        "neck.all"
    ].item() == pytest.approx(before, rel=1e-5)


def test_the_four_finest_levels_are_the_default() -> None:
    assert PKD(spec(), spec()).pairs == [(4, 4), (8, 8), (16, 16), (32, 32)]
    dense = spec(strides=(8, 16, 32, 64, 128), two_stage=False)
    assert PKD(dense, dense).pairs == [(8, 8), (16, 16), (32, 32), (64, 64)]
    assert PKD(dense, spec()).pairs == [(8, 8), (16, 16), (32, 32), (64, 64)]
    assert PKD(dense, spec(), neck={"match": "position"}).pairs == [(8, 4), (16, 8), (32, 16), (64, 32)]


def test_unequal_sizes_are_resized_to_the_teacher() -> None:
    """A pair by position: the student's map is half as large; corners are not aligned."""
    dense = spec(strides=(8, 16, 32, 64, 128), two_stage=False)
    student, teacher = random_view(batch(OBJECTS), dense, 1), random_view(batch(OBJECTS), spec(), 2)
    found = PKD(dense, spec(), neck={"match": "position", "levels": 1})(student, teacher)["neck.all"].item()
    # Twice the size: the sample in the middle of a new cell lies a quarter of a cell from the nearest old one.
    grid = (np.arange(16) + 0.5) / 2 - 0.5
    low = np.clip(np.floor(grid), 0, 7).astype(int)
    high, part = np.clip(low + 1, 0, 7), np.clip(grid, 0, None) - low
    x = student.neck[8].numpy()
    x = x[..., low, :] * (1 - part)[:, None] + x[..., high, :] * part[:, None]
    x = x[..., low] * (1 - part) + x[..., high] * part
    assert found == pytest.approx(slow_error(torch.tensor(x), teacher.neck[4]), rel=1e-9)
    of_one_stride = FakeView(student.batch, spec(), neck={4: student.neck[8]})
    assert PKD(spec(), spec(), neck={"levels": [4]})(of_one_stride, teacher)["neck.all"].item() == pytest.approx(found)
    small, large = equally_large(student.neck[8], teacher.neck[4], "teacher")
    assert small.shape == large.shape == student.neck[8].shape


def test_a_constant_channel_and_a_single_cell_have_numbers() -> None:
    student = torch.ones(1, 2, 1, 1, requires_grad=True)
    ((total, _),) = correlation_errors([(student, torch.zeros(1, 2, 1, 1))])
    total.backward()
    assert total == 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_unequal_channels_get_an_adapter_and_options_are_checked() -> None:
    wide = replace(spec(), neck=dict.fromkeys(spec().neck, 8))
    loss = PKD(spec(), wide)
    assert {tuple(parameter.shape) for name, parameter in loss.named_parameters() if "weight" in name} == {(8, 6, 1, 1)}
    with pytest.raises(DistillError, match="match of stride or position"):
        PKD(spec(), spec(), neck={"match": "size"})
    with pytest.raises(DistillError, match=r"If this is a stride, write neck\.levels=\[16\]"):
        PKD(spec(), spec(), neck={"levels": 16})
    with pytest.raises(DistillError, match="a number of levels"):
        PKD(spec(), spec(), neck={"match": "position", "levels": [4]})
