"""MasKD: the masked error by loops, and the training of the tokens on a real teacher."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.maskd import MasKD, MaskTokens, dice, masked_error
from distill.types import DistillError
from helpers.detectors import padded_batch, random_detector
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS

OFF = {"task": 0.0, "diversity": 0.0}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_masks(tokens: Tensor, image: Tensor) -> list[list[float]]:
    """One list of cells for each token."""
    return [[sigmoid(sum(a * b for a, b in zip(token, cell, strict=True))) for cell in image.flatten(1).T.tolist()]
            for token in tokens.tolist()]  # fmt: skip


def slow_term(loss: MasKD, student: FakeView, teacher: FakeView, both: bool) -> float:
    value = 0.0
    for at, x in student.neck.items():
        part = loss.tokens[str(at)]
        for own, target in zip(x, teacher.neck[at], strict=True):
            hidden = F.conv2d(target[None], part.filters, part.filters_bias, padding=1).mean((0, 2, 3))
            powers = (part.weights @ hidden + part.bias).exp()
            masks = slow_masks(part.tokens, target)
            if both:
                of_student = slow_masks(part.tokens, own)
                masks = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(masks, of_student, strict=True)]
            pairs = list(zip(own.flatten(1).T.tolist(), target.flatten(1).T.tolist(), strict=True))
            for mask, weight in zip(masks, (powers / powers.sum()).tolist(), strict=True):
                total = sum(
                    (m * (b - a)) ** 2 for m, (c, d) in zip(mask, pairs, strict=True) for a, b in zip(c, d, strict=True)
                )
                value += weight * total / sum(mask) / 6 / len(x)
    return value


def views(dtype: torch.dtype = torch.float64) -> tuple[FakeView, FakeView]:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed, dtype=dtype) for seed in (1, 2))
    for view in (student, teacher):
        for leaf in view.leaves():
            leaf.requires_grad_()
    return student, teacher


@pytest.mark.parametrize("epoch", [0, 1])
def test_equals_its_oracle_before_and_after_the_warmup(epoch: int) -> None:
    loss = MasKD(spec(), spec(), tokens=OFF, adapter={"kernel": None}).double()
    loss.on_epoch_start(epoch, None, None, None)
    student, teacher = views()
    value = loss(student, teacher)["neck.all"]
    with torch.no_grad():
        assert value.item() == pytest.approx(slow_term(loss, student, teacher, both=epoch == 1), rel=1e-10)
    value.backward()
    assert all(x.grad is not None and x.grad.any() for x in student.neck.values())
    assert all(x.grad is None for x in teacher.leaves())
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_one_mask_of_ones_is_the_mean_squared_error_and_equal_masks_overlap() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    error = masked_error(student, teacher, torch.ones(2, 1, 4, 5), torch.ones(2, 1))
    torch.testing.assert_close(error, (student - teacher).square().mean((1, 2, 3)))
    mask = torch.rand(1, 1, 4, 5)
    assert dice(mask.expand(1, 3, 4, 5)).item() == pytest.approx(1, rel=1e-5)
    apart = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert dice(apart).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [(5, 4), (1, 3), (2, 1), (1, 1)])
def test_probabilities_are_those_of_a_convolution_and_start_as_published(size: tuple[int, int]) -> None:
    """The released layers: 3x3 convolution, mean over cells, 1x1 convolution, softmax."""
    part, x = MaskTokens(64, 6, seed=3).double(), torch.randn(2, 64, *size, dtype=torch.float64)
    with torch.no_grad():
        part.filters_bias.normal_()
        part.bias.normal_()
        pooled = F.conv2d(x, part.filters, part.filters_bias, padding=1).mean((2, 3), keepdim=True)
        expected = F.conv2d(pooled, part.weights[..., None, None], part.bias).softmax(1)
    torch.testing.assert_close(part.probabilities(x), expected[:, :, 0, 0])
    start = MaskTokens(64, 6, seed=3)
    assert start.filters.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert start.weights.std().item() == pytest.approx(math.sqrt(2 / 6), rel=0.15)
    assert not start.filters_bias.any()


def gradients(module: Any) -> list[bool]:
    return [parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters()]


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_tokens_learn_from_the_teachers_own_losses_and_then_stay(family: str) -> None:
    student, teacher = random_detector(family), random_detector(family, seed=1).eval().requires_grad_(False)
    loss, data = MasKD(student.spec, teacher.spec), padded_batch()
    for epoch in (0, 1):
        loss.on_epoch_start(epoch, None, None, None)
        loss.zero_grad()
        values = loss(student.view(data, seed=0), teacher.view(data, frozen=True, seed=0))
        assert values.keys() == loss.weights.keys()
        assert all(value.isfinite() and value.requires_grad for value in values.values())
        (values["tokens.task"] + values["tokens.diversity"]).backward()
        assert all(parameter.grad is not None for parameter in loss.parameters() if parameter.requires_grad)
        learns = [name for name, parameter in loss.tokens.named_parameters() if parameter.grad.any()]
        assert bool(learns) == (epoch == 0)
        assert not any(gradients(teacher))
        assert not any(gradients(student))
    assert values["tokens.task"] == 0


def test_the_teachers_losses_get_its_own_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher has the student's classes in another order, and knows no owl."""
    student, teacher = random_detector("retinanet"), random_detector("retinanet", seed=1).eval().requires_grad_(False)
    teacher.spec = replace(teacher.spec, classes=("bat", "dog", "cat"), bridge={"dog": "dog", "cat": "cat"})
    own, seen = teacher.net.compute_loss, []
    monkeypatch.setattr(teacher.net, "compute_loss", lambda targets, *rest: seen.append(targets) or own(targets, *rest))
    data = padded_batch()
    MasKD(student.spec, teacher.spec)(student.view(data, seed=0), teacher.view(data, frozen=True, seed=0))
    assert [target["labels"].tolist() for target in seen[0]] == [[3, 2], [], [3, 2]]
    torch.testing.assert_close(seen[0][0]["boxes"], data.targets[0].boxes[:2])
    merged = replace(teacher.spec, bridge={"bat": "cat", "cat": "cat", "dog": "dog"})
    with pytest.raises(DistillError, match="several classes of the teacher stand for one"):
        MasKD(student.spec, merged)


def test_weight_decay_leaves_the_masks_of_trained_tokens() -> None:
    loss = MasKD(spec(), spec(), adapter={"kernel": None}).double()
    student, teacher = views()
    loss.on_epoch_start(1, None, None, None)
    before = loss(student, teacher)
    sum(before.values()).backward()
    assert all(parameter.grad is not None for parameter in loss.tokens.parameters())
    torch.optim.SGD(loss.tokens.parameters(), lr=1.0, weight_decay=0.5).step()
    loss.on_epoch_start(2, None, None, None)
    assert torch.equal(loss(student, teacher)["neck.all"], before["neck.all"])
    resumed = MasKD(spec(), spec(), adapter={"kernel": None}, seed=1).double()
    resumed.load_state_dict(loss.state_dict())
    resumed.on_epoch_start(2, None, None, None)
    assert torch.equal(resumed(student, teacher)["neck.all"], before["neck.all"])


@pytest.mark.parametrize("alike", [True, False])
def test_masks_that_stay_alike_are_reported_once(alike: bool) -> None:
    """Untrained tokens are nearly 0, so all masks are about 1/2 everywhere."""
    loss = MasKD(spec(), spec(), tokens={"task": 0.0}, adapter={"kernel": None}).double()
    if not alike:
        with torch.no_grad():
            for part in loss.tokens.values():
                part.tokens.normal_(0, 5, generator=torch.Generator().manual_seed(0))
    loss.on_epoch_start(0, None, None, None)
    loss(*views())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss.on_epoch_start(1, None, None, None)
        loss(*views())
        loss.on_epoch_start(2, None, None, None)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == int(alike)
    assert all("maskd: the masks are still alike after tokens.epochs=1 (overlap 1.00" in text for text in messages)


def test_half_precision_and_draws() -> None:
    student, teacher = (view.mapped(lambda x: x.to(torch.bfloat16)) for view in views(torch.float32))
    state = torch.get_rng_state()
    loss = MasKD(spec(), spec(), tokens=OFF, adapter={"kernel": None})
    assert torch.equal(state, torch.get_rng_state())
    value = loss(student, teacher)["neck.all"]
    assert value.dtype == torch.float32
    assert value.isfinite()
    seeds = [MasKD(spec(), spec(), seed=seed).tokens["4"].tokens for seed in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_refusals() -> None:
    with pytest.raises(DistillError, match=r"tokens\.count: expected 1 or more"):
        MasKD(spec(), spec(), tokens={"count": 0})
    with pytest.raises(DistillError, match="expected epochs and warmup"):
        MasKD(spec(), spec(), tokens={"epochs": -1})
