"""SSIM: kornia's values, the equation as slow loops in float64, and each promise of its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kornia
import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses import similarity
from distill.losses.base import DistillLoss
from distill.losses.kernels import blocks, windows
from distill.losses.similarity import Dissimilarity
from distill.losses.ssim import SSIM
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, equal_views, random_view, spec
from helpers.grids import exhaustive
from helpers.loss_grid import OBJECTS, LossGrid
from helpers.slow_oracles import slow_masks

NO_ADAPTER = {"kernel": None}
AXES = {"plane": (2, 3), "image": (1, 2, 3), "tensor": (0, 1, 2, 3)}


# -- the equation, cell by cell


def slow_rescaled(x: Tensor, scope: str) -> np.ndarray[Any, Any]:
    values = x.detach().double().numpy()
    if scope == "none":
        return values
    low, high = values.min(AXES[scope], keepdims=True), values.max(AXES[scope], keepdims=True)
    return np.where(high - low < 1e-6, 0, (values - low) / (high - low + 1e-6))


def slow_window(size: int, sigma: float) -> np.ndarray[Any, Any]:
    half = size // 2
    weights = [
        [math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in range(-half, half + 1)] for i in range(-half, half + 1)
    ]
    return np.array(weights) / np.sum(weights)


def slow_cell(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], window: np.ndarray[Any, Any], powers: Any) -> float:
    """1 - SSIM by half, of two windows, by its three factors and central moments."""
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    dev_x, dev_y = math.sqrt((window * (x - mean_x) ** 2).sum()), math.sqrt((window * (y - mean_y) ** 2).sum())
    covariance = (window * (x - mean_x) * (y - mean_y)).sum()
    c1, c2, c3 = 1e-4, 9e-4, 4.5e-4
    factors = [
        (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1),
        (2 * dev_x * dev_y + c2) / (dev_x**2 + dev_y**2 + c2),
        (covariance + c3) / (dev_x * dev_y + c3),
    ]
    product = math.prod(
        math.copysign(abs(factor) ** power, factor) for factor, power in zip(factors, powers, strict=True) if power
    )
    return (1 - product) / 2


def slow_error(compare: Dissimilarity, student: Tensor, teacher: Tensor) -> Tensor:
    """(B, H, W): summed over channels."""
    x, y = slow_rescaled(student, compare.normalize), slow_rescaled(teacher, compare.normalize)
    if compare.error != "ssim":
        return torch.tensor(np.abs(x - y) ** int(compare.error[1])).sum(1)
    half, window = compare.size // 2, slow_window(compare.size, compare.sigma)
    pads = ((0, 0), (0, 0), (half, half), (half, half))
    wide_x, wide_y = np.pad(x, pads, mode="reflect"), np.pad(y, pads, mode="reflect")
    value = np.empty(x.shape)
    for image, channel, row, column in np.ndindex(*x.shape):
        here = (image, channel, slice(row, row + compare.size), slice(column, column + compare.size))
        value[image, channel, row, column] = slow_cell(wide_x[here], wide_y[here], window, compare.exponents)
    return torch.tensor(value).sum(1)


class TestSSIM(LossGrid):
    options: Mapping[str, Any] = {}
    compare = Dissimilarity()

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return SSIM(student, teacher, **self.options, adapter=NO_ADAPTER)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return SSIM(student, teacher, **self.options)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        value = 0.0
        for stride, x in student.neck.items():
            value += slow_error(self.compare, x, teacher.neck[stride]).sum().item() / x.numel()
        return {"neck.foreground": value}


class TestL1(TestSSIM):
    options: Mapping[str, Any] = {"error": "l1", "normalize": "image"}
    compare = Dissimilarity("l1", "image")


class TestL2(TestSSIM):
    options: Mapping[str, Any] = {"error": "l2", "normalize": "plane"}
    compare = Dissimilarity("l2", "plane")


class TestMaskedSSIM(TestSSIM):
    options: Mapping[str, Any] = {
        "neck": {"foreground": 2, "background": 3},
        "mask": {"kind": "ground_truth"},
        "window": {"size": 5, "sigma": 1.0},
        "exponents": {"luminance": 0.5, "contrast": 2.0, "structure": 1.5},
        "normalize": "image",
    }
    compare = Dissimilarity("ssim", "image", 5, 1.0, 0.5, 2.0, 1.5)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        boxes = [target.boxes for target in student.batch.targets]
        inside = slow_masks(boxes, {stride: (x.shape[2], x.shape[3]) for stride, x in student.neck.items()})
        terms = {"neck.foreground": 0.0, "neck.background": 0.0}
        for stride, x in student.neck.items():
            error = slow_error(self.compare, x, teacher.neck[stride])
            for region, mask in (("foreground", inside[stride]), ("background", 1 - inside[stride])):
                cells = x.shape[1] * mask.sum().item()
                terms[f"neck.{region}"] += (mask * error).sum().item() / max(1.0, cells)
        return terms


class TestMaskedBlocks(TestMaskedSSIM):
    """All exponents 1, plane by plane: what is summed in blocks."""

    options: Mapping[str, Any] = {"neck": {"foreground": 2, "background": 3}, "mask": {"kind": "ground_truth"}}
    compare = Dissimilarity()


# -- known values


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape).to(dtype), torch.randn(*shape).to(dtype)


def mean(student: Tensor, teacher: Tensor, **options: Any) -> float:
    """Over elements."""
    return Dissimilarity(**options)(student, teacher).sum().item() / student.numel()


def test_value_of_a_fixed_draw() -> None:
    """The reference value was computed in float32, where a variance is a difference of near numbers."""
    student, teacher = pair(2, 16, 12, 14)
    assert mean(student, teacher) == pytest.approx(0.49732679, abs=1e-6)
    assert mean(student.double(), teacher.double()) == pytest.approx(0.49732679, abs=5e-7)


@pytest.mark.parametrize("size", [(12, 14), (6, 40), (33, 7)])
@pytest.mark.parametrize("window", [11, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_kornia(size: tuple[int, int], window: int, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = (similarity.rescaled(x) for x in pair(2, 5, *size, dtype=dtype))
    student.requires_grad_()
    expected = kornia.losses.ssim_loss(student, teacher, window, reduction="none")
    actual = (1 - similarity.similarity(student, teacher, similarity.gaussian(window, like=student))) / 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=100 * tolerance)


def test_known_extremes() -> None:
    zeros, ones = torch.zeros(1, 2, 9, 9), torch.ones(1, 2, 9, 9)
    assert mean(zeros, ones, normalize="none") == pytest.approx(0.49995, abs=1e-6)  # 1/2 - C1 / 2 (1 + C1)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert mean(x, 1 - x) == pytest.approx(0.98, abs=0.01)
    assert mean(x, x) == 0
    assert mean(x, 3 * x - 7) == pytest.approx(0, abs=1e-4)  # the rescaling takes scale and offset away
    assert mean(x, 3 * x - 7, normalize="none") > 0.4


def test_is_symmetric() -> None:
    student, teacher = pair(2, 3, 12, 14, dtype=torch.float64)
    assert mean(student, teacher) == pytest.approx(mean(teacher, student), abs=1e-15)


@pytest.mark.parametrize("size", [1, 3, 11])
@pytest.mark.parametrize("cells", [1, 2, 3, 5, 6, 40])
def test_windows_sum_to_one_and_are_reflected_as_numpy_pads(size: int, cells: int) -> None:
    window = similarity.gaussian(size, 1.5, torch.empty(0, dtype=torch.float64))
    assert window.sum().item() == pytest.approx(1, abs=1e-15)
    matrix = similarity.blur_matrix(cells, window)
    assert matrix.sum(1).tolist() == pytest.approx([1.0] * cells, abs=1e-14)
    signal = np.random.default_rng(0).normal(size=cells)
    expected = np.convolve(np.pad(signal, size // 2, mode="reflect"), window.numpy(), mode="valid")
    assert (matrix @ torch.tensor(signal)).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# -- factors


def test_three_factors_equal_two() -> None:
    student, teacher = (similarity.rescaled(x) for x in pair(2, 3, 12, 14, dtype=torch.float64))
    teacher[0, 0] = 0.25  # flat
    window = similarity.gaussian(like=student)
    alone = [
        similarity.similarity(student, teacher, window, exponents) for exponents in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    torch.testing.assert_close(math.prod(alone), similarity.similarity(student, teacher, window), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("powers", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 1, 3), (0.5, 0.5, 2)])
@pytest.mark.parametrize("flat", [False, True])
def test_exponents_equal_the_brute_force(powers: tuple[float, float, float], flat: bool) -> None:
    student, teacher = pair(2, 2, 7, 9, dtype=torch.float64)
    if flat:
        student[0, 0], teacher[1, 1] = 2.0, 3.0
    compare = Dissimilarity("ssim", "plane", 11, 1.5, *powers)
    torch.testing.assert_close(compare(student, teacher), slow_error(compare, student, teacher), rtol=1e-6, atol=1e-9)


def test_opposite_structure_is_far_under_an_even_exponent() -> None:
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for power in (1.0, 2.0, 0.5):
        assert mean(x, 1 - x, luminance=0.0, contrast=0.0, structure=power) > 0.95


# -- gradients


@pytest.mark.parametrize("error", ["ssim", "l2"])
@pytest.mark.parametrize("powers", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.5)])
@pytest.mark.parametrize("scope", ["plane", "image", "tensor", "none"])
def test_gradient_is_that_of_the_value(error: str, powers: tuple[float, float, float], scope: str) -> None:
    student, teacher = pair(2, 2, 4, 7, dtype=torch.float64)
    compare = Dissimilarity(error, scope, 5, 1.0, *powers)
    assert torch.autograd.gradcheck(lambda x: compare(x, teacher), student.abs().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("powers", [(1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("scope", ["plane", "none"])
def test_flat_maps_have_finite_gradients(dtype: torch.dtype, powers: tuple[float, float, float], scope: str) -> None:
    varied = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    half_flat = varied.clone()
    half_flat[..., :4] = 0.5
    for student in (torch.zeros_like(varied), torch.full_like(varied, 0.7), half_flat):
        for teacher in (student.clone(), varied, torch.ones_like(varied)):
            leaf = student.clone().requires_grad_()
            Dissimilarity("ssim", scope, 3, 1.5, *powers)(leaf, teacher).mean().backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
            assert leaf.grad.abs().max() < 1e3


def test_a_flat_plane_is_not_blown_up() -> None:
    student, teacher = pair(1, 3, 8, 8)
    student[:, 1] = 5.0
    leaf = student.requires_grad_()
    Dissimilarity()(leaf, teacher).mean().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 1].abs().max() == 0
    assert leaf.grad[:, 0].abs().max() > 0


# -- blocks of planes


@pytest.fixture(params=[1, 3, 100])
def planes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As many planes of 9 x 23 cells in a block, and products narrower than these maps."""
    monkeypatch.setattr(blocks, "VALUES", {"cpu": request.param * 9 * 23})
    monkeypatch.setattr(windows, "BANDS", {"cpu": (4, 5)})
    return int(request.param)


def summed(
    student: Tensor, teacher: Tensor, masks: Sequence[Tensor], factors: Sequence[float], **options: Any
) -> tuple[Tensor, Tensor]:
    """The sums under some masks, and the gradient of their sum with these factors."""
    leaf = student.clone().requires_grad_()
    sums = torch.stack(list(Dissimilarity(**options).sums(leaf, teacher, masks)))
    (sums * torch.tensor(factors)).sum().backward()
    assert leaf.grad is not None
    return sums.detach(), leaf.grad


ERRORS: dict[str, dict[str, Any]] = {
    "ssim": {},
    "structure": {"luminance": 0.0, "contrast": 0.0},
    "powers": {"luminance": 0.5, "contrast": 2.0, "structure": 0.0},
    "l1": {"error": "l1"},
    "l2": {"error": "l2"},
}


@pytest.mark.usefixtures("planes")
@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("scope", ["plane", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_blocks_give_what_whole_maps_give(name: str, scope: str, dtype: torch.dtype, tolerance: float) -> None:
    """With flat planes, and with many cells that are the smallest or the largest of theirs.

    An unscaled flat plane has a variance that is only rounding error, and some exponents take its root.
    """
    student, teacher = (x.clamp(0, 1) for x in pair(2, 5, 9, 23, dtype=dtype))
    student[1, 3] = teacher[1, 3]
    if scope == "plane" or name not in ("structure", "powers"):
        student[0, 0], teacher[1, 2] = 3.0, 0.5
    masks = [torch.rand(2, 9, 23).to(dtype), torch.ones(2, 9, 23, dtype=dtype), torch.zeros(2, 9, 23, dtype=dtype)]
    actual, expected = (
        summed(student, teacher, masks, [2.0, -0.5, 1.0], normalize=scope, blocks=in_blocks, **ERRORS[name])
        for in_blocks in (True, False)
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=5 * tolerance * scale)


@pytest.mark.usefixtures("planes")
@pytest.mark.parametrize("scope", ["plane", exhaustive("none")])
@pytest.mark.parametrize(
    "powers",
    [
        {},
        exhaustive({"luminance": 0.0, "contrast": 0.0}),
        exhaustive({"contrast": 0.0, "structure": 0.0}),
        {"contrast": 2.0},
    ],
)
def test_the_gradient_of_blocks_is_that_of_their_value(scope: str, powers: dict[str, float]) -> None:
    student, teacher = pair(2, 2, 4, 7, dtype=torch.float64)
    masks = [torch.rand(2, 4, 7).double(), torch.ones(2, 4, 7).double()]
    compare = Dissimilarity("ssim", scope, 5, 1.0, **powers)
    assert torch.autograd.gradcheck(lambda x: tuple(compare.sums(x, teacher, masks)), student.abs().requires_grad_())


def test_blocks_take_any_layout_and_leave_the_maps_alone() -> None:
    student, teacher = pair(2, 5, 9, 23, dtype=torch.float64)
    masks, before = [torch.ones(2, 9, 23)], (student.clone(), teacher.clone())
    expected = summed(student, teacher, masks, [1.0])
    laid = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    for actual, wanted in zip(summed(*laid, masks, [1.0]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-15)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("planes", [slice(0, 40), slice(3, 20), slice(39, 40)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_planes_are_laid_in_one_piece(planes: slice, layout: torch.memory_format) -> None:
    part = torch.rand(2, 40, 9, 23).to(memory_format=layout)[1, planes]
    before = part.clone()
    copied = blocks.contiguous(part)
    assert copied.is_contiguous()
    assert torch.equal(copied, before)


@pytest.mark.parametrize("name", ERRORS)
def test_blocks_keep_one_map_for_the_backward_pass(name: str) -> None:
    student, teacher = pair(2, 5, 9, 23)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        compare = Dissimilarity(**ERRORS[name])
        (total,) = compare.sums(student.requires_grad_(), teacher, [torch.ones(2, 9, 23)])
    # A block's own graph is gone with it.
    kept = [tensor for tensor in kept if tensor.shape == student.shape]
    assert sum(tensor.numel() for tensor in kept if tensor.numel() > 10) == student.numel()
    (first,), (second,) = (torch.autograd.grad(total, student, retain_graph=True) for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: pytest.fail("kept a tensor"), lambda x: x):
        (alone,) = compare.sums(student, teacher, [torch.ones(2, 9, 23)])
    assert alone == total


def test_small_gradients_of_half_precision_are_not_lost_before_the_loss_is_scaled() -> None:
    student, teacher = (x.half() for x in pair(1, 2, 9, 9))
    leaf = student.requires_grad_()
    (total,) = Dissimilarity().sums(leaf, teacher, [torch.full((1, 9, 9), 1e-9)])
    (1e9 * total).backward()
    expected = summed(student.detach().float(), teacher.float(), [torch.ones(1, 9, 9)], [1.0])[1]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2e-3, atol=1e-6)


# -- precision, scopes, small maps


def test_a_nearly_flat_map_is_compared_in_full_precision_under_autocast() -> None:
    """In bfloat16 a variance is lost in the difference that makes it."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (0.5 + 0.003 * torch.randn(1, 4, 12, 12, generator=generator) for _ in range(2))
    exact = mean(student.double(), teacher.double(), normalize="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = mean(student, teacher, normalize="none")
    assert single == pytest.approx(exact, rel=1e-2)
    window = similarity.gaussian().bfloat16()
    half = (1 - similarity.similarity(student.bfloat16(), teacher.bfloat16(), window)).mean().item() / 2
    assert abs(half - exact) > 5 * abs(single - exact)


@pytest.mark.parametrize("powers", [(1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)])
def test_large_raw_maps_stay_in_range(powers: tuple[float, float, float]) -> None:
    """Flat to the eye, their variances are nothing but rounding."""
    student, teacher = (20000 + x / 10 for x in pair(1, 2, 16, 16))
    leaf = student.requires_grad_()
    error = Dissimilarity("ssim", "none", 11, 1.5, *powers)(leaf, teacher)
    assert error.min() >= 0
    assert error.max() <= 2
    error.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("scope", ["plane", "image", "tensor", "none"])
def test_scope_of_the_rescaling(scope: str) -> None:
    x = pair(2, 3, 4, 5, dtype=torch.float64)[0] * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    torch.testing.assert_close(similarity.rescaled(x, scope).numpy(), slow_rescaled(x, scope))


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 1), (2, 3), (5, 11), (7, 5)])
def test_maps_smaller_than_the_window(size: tuple[int, int]) -> None:
    student, teacher = pair(2, 3, *size, dtype=torch.float64)
    for scope in ("plane", "image"):
        compare = Dissimilarity(normalize=scope)
        leaf = student.clone().requires_grad_()
        value = compare(leaf, teacher)
        torch.testing.assert_close(value, slow_error(compare, student, teacher))
        value.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


# -- the class


def test_levels_are_summed_and_can_be_chosen() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))

    def value(levels: list[int] | None) -> float:
        terms = SSIM(spec(), spec(), {"levels": levels}, adapter=NO_ADAPTER)(student, teacher)
        return terms["neck.foreground"].item()

    assert value(None) == pytest.approx(sum(value([level]) for level in (4, 8, 16, 32, 64)))
    assert value([8]) == pytest.approx(mean(student.neck[8], teacher.neck[8]))
    assert teacher.reads == {"neck"}


def test_channels_are_adapted_by_one_convolution_a_level() -> None:
    student_spec, teacher_spec = spec(neck=6), spec(neck=10)
    loss = SSIM(student_spec, teacher_spec)
    assert {tuple(parameter.shape) for parameter in loss.parameters()} == {(10, 6, 1, 1), (10,)}
    pair = (random_view(batch(OBJECTS), of_model, 1, dtype=torch.float32) for of_model in (student_spec, teacher_spec))
    LossGrid.finite(loss(*pair))


def test_the_background_counts_with_a_mask_only() -> None:
    both = {"foreground": 2, "background": 3}
    assert SSIM(spec(), spec(), {"foreground": 2}).weights == {"neck.foreground": 2}
    assert SSIM(spec(), spec(), both, mask={"kind": "gaussian"}).weights == {
        "neck.foreground": 2,
        "neck.background": 3,
    }


def test_without_weight_nothing_is_built_or_read() -> None:
    loss = SSIM(spec(), spec(neck=9), {"foreground": 0}, adapter=NO_ADAPTER)
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    assert loss(student, teacher) == {}
    assert not student.reads
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": {"levels": [4, 128]}}, r"neck.levels: .* shared are \[4, 8, 16, 32, 64\]"),
        ({"neck": {"whole": 4}}, "neck: unknown option 'whole'"),
        ({"neck": {"foreground": -1}}, "SSIM: expected weights"),
        ({"error": "mse"}, "error: expected one of ssim, l1, l2, got 'mse'"),
        ({"normalize": "channel"}, "normalize: expected one of plane, image, tensor, none, got 'channel'"),
        ({"window": {"size": 10}}, "window.size: expected an odd number of cells, got 10"),
        ({"window": {"size": 5.0}}, "window.size"),
        ({"window": {"sigma": 0}}, "window.sigma: expected cells, above 0, got 0"),
        ({"window": {"sigm": 1}}, "window: unknown option 'sigm'.*did you mean 'sigma'"),
        ({"exponents": {"luminance": -1}}, "exponents: expected numbers, 0 or more"),
        ({"exponents": dict.fromkeys(("luminance", "contrast", "structure"), 0)}, "one above 0"),
        ({"exponents": {"alpha": 1}}, "exponents: unknown option 'alpha'"),
        ({"mask": {"kind": "gt"}}, "mask.kind"),
        ({"adapter": {"kernel": 2}}, "adapter: expected a kernel"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        SSIM(spec(), spec(), **options)


def test_detectors_that_do_not_match_are_refused() -> None:
    with pytest.raises(
        DistillError, match=r"the student has 6 channels and the teacher 8\. Set adapter.kernel=auto, 1 or 3"
    ):
        SSIM(spec(neck=6), spec(neck=8), adapter=NO_ADAPTER)
    with pytest.raises(DistillError, match=r"shared are \[\]"):
        SSIM(spec(strides=(4, 8)), spec(strides=(16, 32)))


# -- equal views


@pytest.mark.parametrize("change", [lambda x: x, lambda x: 5 * x + 3], ids=["equal", "scaled and moved"])
def test_nothing_is_left_to_learn_when_the_maps_look_alike(change: Callable[[Tensor], Tensor]) -> None:
    student = random_view(batch(OBJECTS), spec(), 1)
    teacher = equal_views(student).mapped(change)
    value = SSIM(spec(), spec(), adapter=NO_ADAPTER)(student, teacher)["neck.foreground"]
    assert value.item() == pytest.approx(0, abs=1e-8)


def test_a_background_without_a_mask_is_refused() -> None:
    with pytest.raises(DistillError, match=r"neck\.background=5: without a mask the whole map is foreground"):
        SSIM(spec(), spec(), neck={"background": 5})
