"""MGD: the masked and restored map by loops over images, with given masks, and the promises of the draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.base import DistillLoss
from distill.losses.mgd import MGD, kept
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, TrainedLayers


class TestMGD(TrainedLayers):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return MGD(student, teacher, neck={"all": 1.0, "levels": None}, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return MGD(student, teacher, neck={"all": 1.0, "levels": 3}, adapter={"kernel": 1})

    def oracle(self, loss: MGD, student: FakeView, teacher: FakeView) -> dict[str, float]:
        value = 0.0
        for at, x in student.neck.items():
            mask = loss._mask(x, at, loss.seeds(student.batch.ids))
            first, _, second = loss.generators[str(at)]
            for image, target, visible in zip(x, teacher.neck[at], mask, strict=True):
                assert visible.shape == (1, *image.shape[1:])
                hidden = torch.where(visible > 0, image, 0.0)
                restored = F.conv2d(F.conv2d(hidden, first.weight, first.bias, padding=1).relu(), second.weight,
                                    second.bias, padding=1)  # fmt: skip
                value += (restored - target).pow(2).sum().item() / len(x)
        return {"neck.all": value}


def test_a_cell_is_hidden_with_the_given_probability_for_all_channels() -> None:
    loss = MGD(spec(), spec(), hidden={"ratio": 0.65})
    mask = loss._mask(torch.zeros(1, 6, 200, 200), 4, [7])
    assert mask.shape == (1, 1, 200, 200)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.35, abs=0.01)
    assert torch.equal(kept(torch.tensor([0.0, 0.5, 0.51, 1.0]), 0.5), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    of_channels = MGD(spec(), spec(), hidden={"what": "channels"})._mask(torch.zeros(2, 6, 3, 3), 4, [7, 8])
    assert of_channels.shape == (2, 6, 1, 1)


def test_masks_change_with_image_epoch_and_level_only() -> None:
    loss, x = MGD(spec(), spec()), torch.zeros(2, 6, 8, 8)
    first = loss._mask(x, 4, loss.seeds([7, 8]))
    assert torch.equal(first[:1], loss._mask(x[:1], 4, loss.seeds([7])))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, loss._mask(x, 8, loss.seeds([7, 8])))
    loss.on_epoch_start(1, None, None, None)
    assert not torch.equal(first, loss._mask(x, 4, loss.seeds([7, 8])))


def test_without_masks_and_with_an_identity_it_is_the_squared_error_of_an_image() -> None:
    """Maps above 0 pass the ReLU."""
    loss = MGD(spec(), spec(), neck={"all": 1.0, "levels": 2}, hidden={"ratio": 0.0}).double()
    for layer in (layer for part in loss.generators.values() for layer in part if hasattr(layer, "weight")):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    student, teacher = (random_view(batch(OBJECTS), spec(), seed).mapped(torch.abs) for seed in (1, 2))
    expected = sum((student.neck[at] - teacher.neck[at]).square().sum() / 2 for at in (4, 8))
    torch.testing.assert_close(loss(student, teacher)["neck.all"], expected)


def test_refusals() -> None:
    with pytest.raises(DistillError, match="hidden: expected a ratio from 0 to below 1"):
        MGD(spec(), spec(), hidden={"ratio": 1.0})
