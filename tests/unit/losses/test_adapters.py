"""Adapters: shapes, start values, and that building them draws from no one else's stream."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from distill.losses.adapters import adapter, adapters
from distill.types import DistillError


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = module.parameters()
    return weight, bias


@pytest.mark.parametrize("kernel", [1, 3, "auto"])
@pytest.mark.parametrize("relu", [False, True])
def test_maps_keep_their_size_and_change_channels(kernel: Any, relu: bool) -> None:
    built = adapter(5, 7, kernel, relu, "default")
    for size in ((9, 4), (1, 1)):
        out = built(torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0)))
        assert out.shape == (2, 7, *size)
        assert bool((out < 0).any()) != relu or size == (1, 1)


def test_defeat_start_is_small_with_torchs_bias() -> None:
    weight, bias = weight_and_bias(adapter(256, 256, 3, start="defeat"))
    assert weight.abs().max() < 2e-4
    # N(0, 1) mod 2: E[w^2] = sum over k of the integral of (x - 2k)^2 over [2k, 2k + 2), both signs.
    steps = torch.linspace(0, 8, 800001, dtype=torch.float64)
    density = 2 * torch.exp(-(steps**2) / 2) / math.sqrt(2 * math.pi)
    variance = torch.trapezoid(density * steps.remainder(2) ** 2, steps).item()
    assert weight.std().item() == pytest.approx(1e-4 * math.sqrt(variance), rel=0.01)
    assert weight.mean().abs() < 1e-6
    bound = 1 / math.sqrt(9 * 256)
    assert 0.9 * bound < bias.abs().max() <= bound


def test_fgfi_start_is_defeats_with_a_bias_of_zero() -> None:
    weight, bias = weight_and_bias(adapter(8, 4, 3, start="fgfi", seed=3))
    assert torch.equal(weight, weight_and_bias(adapter(8, 4, 3, start="defeat", seed=3))[0])
    assert not bias.any()


def test_default_start_is_torchs_distribution() -> None:
    weight, bias = weight_and_bias(adapter(64, 128, 3, start="default"))
    with torch.random.fork_rng():
        conv_weight = nn.Conv2d(64, 128, 3).weight
    assert weight.abs().max().item() == pytest.approx(conv_weight.abs().max().item(), rel=1e-3)
    assert weight.std().item() == pytest.approx(conv_weight.std().item(), rel=0.02)
    assert bias.abs().max() <= 1 / math.sqrt(9 * 64)


def test_start_values_depend_on_seed_and_level_alone() -> None:
    before = torch.get_rng_state()
    channels = {4: 3, 8: 3, 16: 4}
    all_levels = adapters(channels, channels, [4, 8, 16], seed=5)
    some = adapters(channels, channels, [8], seed=5)
    other = adapters(channels, channels, [8], seed=6)
    assert torch.equal(before, torch.get_rng_state())
    assert list(all_levels) == ["4", "8", "16"]
    first, second = weight_and_bias(all_levels["8"])[0], weight_and_bias(some["8"])[0]
    assert torch.equal(first, second)
    assert not torch.equal(second, weight_and_bias(other["8"])[0])
    assert not torch.equal(first, weight_and_bias(all_levels["4"])[0])


def test_none_is_the_identity_for_equal_channels() -> None:
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(adapter(4, 4, None)(x), x)
    with pytest.raises(DistillError, match=r"the student has 4 channels and the teacher 8. Set adapter.kernel"):
        adapter(4, 8, None)


def test_auto_is_the_identity_for_equal_channels_and_a_1x1_convolution_otherwise() -> None:
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(adapter(4, 4, "auto")(x), x)
    for start in ("defeat", "default"):
        chosen, expected = (adapter(4, 8, kernel, relu=True, start=start, seed=5) for kernel in ("auto", 1))
        assert [name for name, _ in chosen.named_parameters()] == ["0.weight", "0.bias"]
        assert torch.equal(chosen(x), expected(x))
    levels = adapters({4: 8, 8: 4}, {4: 8, 8: 8}, [4, 8], "auto")
    assert [len(list(level.parameters())) for level in levels.values()] == [0, 2]


@pytest.mark.parametrize("kernel", [None, "auto"])
def test_a_relu_without_a_convolution_is_refused(kernel: Any) -> None:
    with pytest.raises(DistillError, match=r"a ReLU follows a convolution.*adapter\.relu=false"):
        adapter(4, 4, kernel, relu=True)


@pytest.mark.parametrize("options", [{"kernel": 2}, {"kernel": 5}, {"start": "zero"}])
def test_refusals(options: dict[str, object]) -> None:
    with pytest.raises(DistillError, match=r"expected a kernel of \('auto', 1, 3, None\)"):
        adapter(4, 4, **options)  # type: ignore[arg-type]


def test_trainable_on_the_cpu_in_float32() -> None:
    for parameter in adapter(3, 4, 3).parameters():
        assert parameter.requires_grad
        assert parameter.device.type == "cpu"
        assert parameter.dtype == torch.float32
