"""FBKD: its four norms by loops, with layers of known weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.fbkd import FBKD, NonLocal
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, OracleOfTwins, TrainedLayers


def slow_attention(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W)."""
    powers = (x.abs().sum(1) / x.shape[1] / 0.5).exp()
    return powers / powers.sum((1, 2), keepdim=True) * powers[0].numel()


def slow_non_local(block: NonLocal, x: Tensor) -> Tensor:
    """All pairs of cells, image by image; torch's batch norm."""
    out = []
    for image in x:
        cells = image.flatten(1).T
        theta, phi, g = (cells @ layer.weight[:, :, 0, 0].T + layer.bias for layer in (block.theta, block.phi, block.g))
        side = min(block.pool, *image.shape[1:])
        phi, g = (F.max_pool2d(v.T.view(1, -1, *image.shape[1:]), side).flatten(2)[0].T for v in (phi, g))
        weights = theta @ phi.T / len(phi)
        y = weights @ g @ block.out.weight[:, :, 0, 0].T
        out.append(y.T.view(-1, *image.shape[1:]))
    related = torch.stack(out)
    weight, bias = block.norm.weight, block.norm.bias
    if len(cells) * len(x) > 1:
        return x + F.batch_norm(related, None, None, weight, bias, training=True)
    return x + bias.view(1, -1, 1, 1)


def stirred(loss: FBKD) -> FBKD:
    """Non-local blocks that are not the identity; the loss's seed decides their values."""
    generator = torch.Generator().manual_seed(loss.seed)
    with torch.no_grad():
        for block in loss.modules():
            if isinstance(block, NonLocal):
                block.norm.weight.normal_(generator=generator)
                block.norm.bias.normal_(generator=generator)
    return loss


class TestFBKD(TrainedLayers, OracleOfTwins):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return stirred(FBKD(student, teacher, neck={"levels": None}, adapter={"kernel": None}))

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return stirred(FBKD(student, teacher))

    def oracle(self, loss: FBKD, student: FakeView, teacher: FakeView) -> dict[str, float]:
        terms = dict.fromkeys(loss.weights, 0.0)
        for at, x in student.neck.items():
            y, layers = teacher.neck[at], {term: by_level[str(at)] for term, by_level in loss.layers.items()}
            mask = (slow_attention(x) + slow_attention(y)) / 2
            terms["neck.attended"] += (mask[:, None].sqrt() * (y - x)).norm().item()
            linear = layers["channels"]
            pooled = x.mean((2, 3)) @ linear.weight[:, :, 0, 0].T + linear.bias
            terms["neck.channels"] += (y.mean((2, 3)) - pooled).norm().item()
            local = F.conv2d(x.mean(1, keepdim=True), layers["cells"].weight, layers["cells"].bias, padding=1)
            terms["neck.cells"] += (y.mean(1, keepdim=True) - local).norm().item()
            blocks = layers["relation"]
            own = F.conv2d(slow_non_local(blocks["student"], x), blocks["adapter"].weight, blocks["adapter"].bias)
            terms["neck.relation"] += (slow_non_local(blocks["teacher"], y) - own).norm().item()
        return terms


def test_without_layers_a_batch_of_twins_counts_the_root_of_two() -> None:
    neck = {"channels": 0.0, "cells": 0.0, "relation": 0.0, "levels": 2}
    loss = FBKD(spec(), spec(), neck=neck, adapter={"kernel": None})
    student, teacher = (random_view(batch(OBJECTS[:1]), spec(), seed) for seed in (1, 2))
    twins = [view.mapped(lambda x: torch.cat([x, x])) for view in (student, teacher)]
    once, twice = loss(student, teacher)["neck.attended"], loss(*twins)["neck.attended"]
    assert twice.item() == pytest.approx(math.sqrt(2) * once.item())


def test_equal_maps_have_no_distance_and_a_gradient_of_zero() -> None:
    neck = {"channels": 0.0, "cells": 0.0, "relation": 0.0}
    student = random_view(batch(OBJECTS), spec(), 1)
    for leaf in student.leaves():
        leaf.requires_grad_()
    value = FBKD(spec(), spec(), neck=neck, adapter={"kernel": None})(student, student.mapped(torch.clone))
    value["neck.attended"].backward()
    assert value["neck.attended"] < 1e-30
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in student.leaves())


def test_non_local_blocks_are_those_of_mmrazor() -> None:
    """Finest first: pooling by 8, 4, 2, 2, and 64, 64, 128, 128 of 256 channels inside."""
    wide = spec(neck=256)
    relation = FBKD(wide, wide, neck={"levels": None}).layers["relation"]
    for role in ("student", "teacher"):
        blocks = [level[role] for level in relation.values()]
        assert [block.pool for block in blocks] == [8, 4, 2, 2, 2]
        assert [block.theta.out_channels for block in blocks] == [64, 64, 128, 128, 128]


def test_an_untrained_block_is_the_identity_and_its_norm_learns_first() -> None:
    x = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    block = NonLocal(8, pool=2)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.norm.weight.grad is not None
    assert block.norm.weight.grad.any()


def test_a_block_stays_finite_under_fp16_where_a_sum_over_its_cells_would_not() -> None:
    """5 is a plausible feature; the sum over 4200 cells of products of such features is above 65504."""
    x = 5 + torch.randn(1, 32, 60, 70, generator=torch.Generator().manual_seed(0))
    block = NonLocal(32, pool=1)
    with torch.no_grad():
        block.norm.weight.fill_(1)
        for layer in (block.theta, block.phi, block.g):
            layer.weight.fill_(0.04)
        with torch.autocast("cpu", dtype=torch.float16):
            half = block(x)
        full = block(x)
    assert (half - full).norm() < 0.05 * (full - x).norm()


def test_refusals() -> None:
    with pytest.raises(DistillError, match="temperature: expected a number above 0"):
        FBKD(spec(), spec(), temperature=0)
