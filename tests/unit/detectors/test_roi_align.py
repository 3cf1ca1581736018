"""Regions are pooled from the level and the places that He et al. 2017 say, by cells as by torchvision's kernel."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from distill.detectors.roi_align import KERNELS, LEVEL_RULES, region_pool
from distill.types import DistillError

# Levels that Detectron2 and MMDetection gave to boxes of these widths and heights (FPN of strides 4 to 32);
# torchvision's are floor(4 + log2(side / 224) + 1e-6).
BOUNDS = [
    (112.0, 112.0),
    (112.0, 111.99995),
    (111.9999, 111.9999),
    (223.99995, 224.0),
    (447.9999, 447.9999),
    (20.0, 20.0),
]
LEVELS = {"detectron2": [3, 2, 2, 3, 5, 2], "mmdetection": [3, 3, 2, 4, 5, 2], "torchvision": [3, 3, 2, 4, 5, 2]}


@pytest.mark.parametrize("rule", list(LEVELS))
def test_a_side_at_a_bound_goes_where_the_other_framework_puts_it(rule: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, w, h] for w, h in BOUNDS])
    pool = region_pool((4, 8, 16, 32), 7, 2, level_rule=rule)
    assert (pool.map_levels([boxes]) + 2).tolist() == LEVELS[rule]


@pytest.mark.parametrize("rule", list(LEVEL_RULES))
def test_away_from_the_bounds_all_rules_are_the_papers(rule: str) -> None:
    sides = [3.0, 50.0, 111.0, 113.0, 200.0, 225.0, 440.0, 450.0, 900.0, 3000.0]
    boxes = [torch.tensor([[5.0, 7.0, 5 + 2 * s, 7 + s / 2]]) for s in sides]
    pool = region_pool((8, 16, 32, 64, 128), 7, 2, level_rule=rule)
    expected = [min(max(math.floor(4 + math.log2(side / 224)), 3), 7) - 3 for side in sides]
    assert pool.map_levels(boxes).tolist() == expected


def bilinear(features: Tensor, y: float, x: float) -> float:
    """RoIAlign's sample: 0 a pixel or more outside, else the nearest edge, else between four pixels."""
    height, width = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * features[top, left] + u * features[top, right]
    lower = (1 - u) * features[bottom, left] + u * features[bottom, right]
    return float((1 - v) * upper + v * lower)


def slow_roi_align(features: Tensor, box: list[float], scale: float, sampling: int, aligned: bool) -> Tensor:
    """He et al. 2017, section 3, 7 x 7 bins; `aligned` moves by half a pixel and lets a box be as small as it is."""
    x1, y1, x2, y2 = (side * scale - (0.5 if aligned else 0.0) for side in box)
    w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
    ny, nx = (sampling or math.ceil(h / 7)), (sampling or math.ceil(w / 7))
    pooled = torch.zeros(7, 7)
    for row, column in itertools.product(range(7), range(7)):
        samples = [
            bilinear(features, y1 + (row + (i + 0.5) / ny) * h / 7, x1 + (column + (j + 0.5) / nx) * w / 7)
            for i in range(ny)
            for j in range(nx)
        ]
        pooled[row, column] = sum(samples) / len(samples)
    return pooled


@pytest.mark.parametrize("sampling", [3, 2, 0])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_are_taken_where_it_says(aligned: bool, sampling: int, kernel: str) -> None:
    strides, height, width = (4, 8, 16, 32), 96, 160
    maps = {str(i): torch.rand(1, 1, height // s, width // s) for i, s in enumerate(strides)}
    boxes = [[10.3, 20.1, 50.7, 41.2], [0.0, 0.0, 3.0, 2.0], [30.0, 5.0, 155.0, 90.0], [140.0, 80.0, 160.0, 96.0]]
    pool = region_pool(strides, 7, sampling, aligned, kernel=kernel)
    for box, region in zip(boxes, pool(maps, [torch.tensor(boxes)], [(height, width)]), strict=True):
        level = min(max(math.floor(4 + math.log2(math.sqrt((box[2] - box[0]) * (box[3] - box[1])) / 224)), 2), 5) - 2
        expected = slow_roi_align(maps[str(level)][0, 0], box, 1 / strides[level], sampling, aligned)
        assert torch.allclose(region[0], expected, atol=1e-4)


STRIDES = (4, 8, 16)
HEIGHT, WIDTH = 96, 128


def regions(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Boxes of three images, none in the second: all sizes, across borders, far outside, lines, points, inverted."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([WIDTH, HEIGHT])
    corner = (torch.rand(60, 2, generator=generator) * 1.6 - 0.3) * ends
    side = torch.exp(torch.rand(60, 2, generator=generator) * 6 - 1)
    odd = torch.tensor(
        [
            *([0, 0, WIDTH, HEIGHT], [-400, -400, 900, 900], [-500, -500, -400, -400], [WIDTH, HEIGHT, WIDTH, HEIGHT]),
            *([40, 8, 40, 60], [60, 50, 20, 10], [WIDTH - 4, HEIGHT - 4, WIDTH + 4, HEIGHT + 4], [-4, -4, 4, 4]),
            *([-40, -40, 120, 110], [0, -30, 150, 140]),
        ]
    )
    return [torch.cat([corner, corner + side], 1).to(dtype), torch.zeros(0, 4, dtype=dtype), odd.to(dtype)]


def neck(dtype: torch.dtype, layout: torch.memory_format, channels: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(3, channels, HEIGHT // s, WIDTH // s, generator=generator, dtype=dtype) for s in STRIDES]
    return {str(i): x.to(memory_format=layout).requires_grad_() for i, x in enumerate(maps)}


def op(maps: dict[str, Tensor], boxes: list[Tensor], levels: Tensor, output: int, **options: Any) -> Tensor:
    """torchvision's kernel, one region at a time."""
    images = [index for index, image_boxes in enumerate(boxes) for _ in image_boxes]
    rows = []
    for image, box, level in zip(images, torch.cat(boxes), levels.tolist(), strict=True):
        region = torch.cat([box.new_tensor([image]), box])[None]
        rows.append(roi_align(maps[str(level)], region, output, 1 / STRIDES[level], **options)[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("output", "sampling", "aligned"), [(7, 2, False), (7, 2, True), (14, 1, False), (3, 4, True)])
def test_cells_give_what_the_kernel_gives(
    dtype: torch.dtype, tolerance: float, layout: torch.memory_format, output: int, sampling: int, aligned: bool
) -> None:
    maps, boxes = neck(dtype, layout), regions(dtype)
    pool = region_pool(STRIDES, output, sampling, aligned)
    features = pool(maps, boxes, [(HEIGHT, WIDTH)] * 3)
    levels = pool.map_levels(boxes)
    assert set(levels.tolist()) == {0, 1, 2}
    expected = op(maps, boxes, levels, output, sampling_ratio=sampling, aligned=aligned)
    torch.testing.assert_close(features, expected, rtol=0, atol=5 * tolerance)
    assert features.is_contiguous()
    slope = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    gradients, expected_gradients = (
        torch.autograd.grad(tensor, list(maps.values()), slope) for tensor in (features, expected)
    )
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("aligned", [False, True])
def test_torchvisions_kernel_is_torchvisions_to_the_bit(aligned: bool) -> None:
    maps, boxes = neck(torch.float32, torch.contiguous_format), regions(torch.float32)
    pool = region_pool(STRIDES, 7, 2, aligned, kernel="torchvision")
    features = pool(maps, boxes, [(HEIGHT, WIDTH)] * 3)
    if aligned:
        expected = op(maps, boxes, pool.map_levels(boxes), 7, sampling_ratio=2, aligned=True)
    else:
        plain = MultiScaleRoIAlign(list(maps), 7, 2)
        plain.scales, plain.map_levels = pool.scales, pool.map_levels
        expected = plain(maps, boxes, [(HEIGHT, WIDTH)] * 3)
    assert torch.equal(features, expected)
    assert all(x.grad is None for x in maps.values())
    features.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in maps.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_has_the_same_features_alone_as_in_a_batch(layout: torch.memory_format) -> None:
    maps, boxes, pool = neck(torch.float32, layout, 24), regions(torch.float32), region_pool(STRIDES, 7, 2)
    together = pool(maps, boxes, [(HEIGHT, WIDTH)] * 3)
    for image, image_features in zip((0, 2), torch.split(together, [len(boxes[0]), len(boxes[2])]), strict=True):
        alone = pool({name: x[image : image + 1] for name, x in maps.items()}, [boxes[image]], [(HEIGHT, WIDTH)])
        assert torch.equal(alone, image_features)


def test_the_last_cells_of_a_map_are_all_it_has() -> None:
    maps = {"0": torch.rand(1, 3, 1, 2), "1": torch.rand(1, 3, 1, 1)}
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 4.0], [-3.0, -3.0, 250.0, 260.0]])]
    pool = region_pool((4, 8), 7, 2)
    expected = op(maps, boxes, pool.map_levels(boxes), 7, sampling_ratio=2)
    torch.testing.assert_close(pool(maps, boxes, [(4, 8)]), expected)


@pytest.mark.parametrize("aligned", [False, True])
def test_half_precision_is_the_kernels(aligned: bool) -> None:
    maps, boxes = neck(torch.float16, torch.contiguous_format), regions(torch.float16)
    pool, torchvision_pool = (region_pool(STRIDES, 7, 2, aligned, kernel=kernel) for kernel in KERNELS)
    assert torch.equal(pool(maps, boxes, [(HEIGHT, WIDTH)] * 3), torchvision_pool(maps, boxes, [(HEIGHT, WIDTH)] * 3))


def test_boxes_of_another_precision_and_with_a_history_are_read_as_they_are() -> None:
    maps, boxes = neck(torch.float32, torch.contiguous_format), [x.requires_grad_() for x in regions(torch.float64)]
    pool, sizes = region_pool(STRIDES, 7, 2), [(HEIGHT, WIDTH)] * 3
    features = pool(maps, boxes, sizes)
    assert torch.equal(features, pool(maps, [x.detach().float() for x in boxes], sizes))
    features.sum().backward()
    assert all(x.grad is None for x in boxes)


def test_a_level_that_needs_no_gradient_gets_none() -> None:
    maps, boxes = neck(torch.float32, torch.channels_last), regions(torch.float32)
    pool, sizes = region_pool(STRIDES, 7, 2), [(HEIGHT, WIDTH)] * 3
    pool(maps, boxes, sizes).square().sum().backward()
    frozen = {name: x.detach().requires_grad_(name == "1") for name, x in maps.items()}
    pool(frozen, boxes, sizes).square().sum().backward()
    assert [x.grad is None for x in frozen.values()] == [True, False, True]
    assert torch.equal(frozen["1"].grad, maps["1"].grad)  # type: ignore[arg-type]


def test_a_pool_of_another_shape_gives_it() -> None:
    """As a Mask R-CNN's, which is a copy of the other one."""
    maps, boxes, pool = neck(torch.float32, torch.contiguous_format), regions(torch.float32), region_pool(STRIDES, 7, 2)
    pool.output_size = (4, 6)
    features, levels = pool(maps, boxes, [(HEIGHT, WIDTH)] * 3), pool.map_levels(boxes)
    expected = op(maps, boxes, levels, (4, 6), sampling_ratio=2)  # type: ignore[arg-type]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_traced_pool_knows_the_kernel_alone(aligned: bool, tmp_path: Path) -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = region_pool(STRIDES, 7, 2, aligned)

        def forward(self, a: Tensor, b: Tensor, c: Tensor, boxes: Tensor) -> Any:
            return self.pool({"0": a, "1": b, "2": c}, [boxes], [(HEIGHT, WIDTH)])

    maps = [x.detach()[:1] for x in neck(torch.float32, torch.contiguous_format).values()]
    boxes = regions(torch.float32)[0]
    torch.jit.trace(Bare(), (*maps, boxes)).save(tmp_path / "pool.pt")
    features = torch.jit.load(tmp_path / "pool.pt")(*maps, boxes)
    torch.testing.assert_close(features, Bare()(*maps, boxes), rtol=0, atol=1e-5)


def test_torchvisions_kernel_can_be_scripted() -> None:
    assert type(region_pool(STRIDES, 7, 2, kernel="torchvision")) is MultiScaleRoIAlign


def test_the_gradient_is_that_of_the_value() -> None:
    boxes = [
        torch.tensor([[1.0, 2.0, 21.0, 17.0], [-3.0, 4.0, 60.0, 70.0]]).double(),
        torch.tensor([[5.0, 5.0, 6.0, 9.0]]).double(),
    ]
    pool = region_pool((4, 8), 2, 2)
    maps = [torch.rand(2, 2, 32 // s, 40 // s, dtype=torch.float64).requires_grad_() for s in (4, 8)]
    assert torch.autograd.gradcheck(lambda a, b: pool({"0": a, "1": b}, boxes, [(32, 40)] * 2), maps)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("aligned", [False, True])
def test_no_region_gives_none_and_an_empty_gradient(kernel: str, aligned: bool) -> None:
    maps = neck(torch.float32, torch.channels_last)
    features = region_pool(STRIDES, 7, 2, aligned, kernel=kernel)(maps, [torch.zeros(0, 4)] * 3, [(HEIGHT, WIDTH)] * 3)
    assert features.shape == (0, 5, 7, 7)
    features.sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in maps.values())


def test_nothing_but_the_regions_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    boxes = regions(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        region_pool(STRIDES, 7, 2)(neck(torch.float32, torch.channels_last), boxes, [(HEIGHT, WIDTH)] * 3)
    assert sum(tensor.numel() for tensor in kept) == 6 * sum(map(len, boxes))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_box_without_a_place_has_no_level_and_gives_zeros(kernel: str) -> None:
    """As a diverged student may propose; the guard of a run names it."""
    boxes = [torch.tensor([[math.nan, 0.0, 9.0, 9.0], [4.0, 4.0, 20.0, 20.0]])]
    maps = {name: x[:1] for name, x in neck(torch.float32, torch.channels_last).items()}
    features = region_pool(STRIDES, 7, 2, kernel=kernel)(maps, boxes, [(HEIGHT, WIDTH)])
    assert not features[0].any()
    assert features[1].all()
    features.sum().backward()


def test_a_box_without_an_end_asks_for_no_cell_outside() -> None:
    boxes = [torch.tensor([[0.0, 0.0, math.inf, 9.0], [-math.inf, 0.0, 9.0, 9.0], [0.0, 0.0, 1e30, 1e30]])]
    maps = {name: x[:1] for name, x in neck(torch.float32, torch.channels_last).items()}
    features = region_pool(STRIDES, 7, 2)(maps, boxes, [(HEIGHT, WIDTH)])
    features.sum().backward()
    assert features.shape == (3, 5, 7, 7)


def test_the_same_bits_come_again_where_they_are_asked_for() -> None:
    maps, boxes, results = neck(torch.float32, torch.channels_last), regions(torch.float32), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            pooled = region_pool(STRIDES, 7, 2)(maps, boxes, [(HEIGHT, WIDTH)] * 3)
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), list(maps.values()))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_an_unknown_kernel_is_refused_by_name() -> None:
    with pytest.raises(DistillError, match=r"box_roi_align: expected .*fast.*torchvision.*'quick'"):
        region_pool(STRIDES, 7, 2, kernel="quick")
