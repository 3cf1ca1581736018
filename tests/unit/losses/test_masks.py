"""Masks against the published counts, and against slow loops over boxes and cells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.detectors.fcos import FCOS
from distill.losses import masks
from distill.types import Batch, DistillError, Target
from helpers.fake_view import FakeView, anchors, batch, corners, spec
from helpers.slow_oracles import iou, slow_fine_grained, slow_masks

# DeFeat's reference values: padded input 800 x 1344, two images.
BOXES = [
    torch.tensor([[10.3, 20.7, 60.2, 71.9], [100, 100, 420, 380], [0, 0, 1300, 799], [500.9, 300.2, 503.0, 420.0]]),
    torch.tensor([[5, 5, 117, 117], [5, 5, 115.9, 115.9]]),
]


def sizes(strides: tuple[int, ...], height: int = 800, width: int = 1344) -> dict[int, tuple[int, int]]:
    return {stride: (math.ceil(height / stride), math.ceil(width / stride)) for stride in strides}


def random_boxes(seed: int, count: int, height: int = 96, width: int = 160) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [corners(count, height, width, generator), corners(count // 2, height, width, generator), torch.zeros(0, 4)]


@pytest.mark.parametrize(
    ("strides", "counts", "whole"),
    [
        ((4, 8, 16, 32, 64), ([157, 0, 340, 0, 240], [729, 196, 0, 0, 0]), (64675, 784)),
        ((8, 16, 32, 64, 128), ([37, 0, 80, 0, 60], [196, 49, 0, 0, 0]), (16038, 196)),
    ],
)
def test_golden_counts(strides: tuple[int, ...], counts: tuple[list[int], list[int]], whole: tuple[int, int]) -> None:
    grid = sizes(strides)
    mask = masks.ground_truth(BOXES, grid)
    assert [[int(mask[stride][image].sum()) for stride in strides] for image in range(2)] == list(counts)
    finest = masks.ground_truth(BOXES, {strides[0]: grid[strides[0]]})[strides[0]]
    assert tuple(finest.sum((1, 2)).int().tolist()) == whole


def test_golden_levels() -> None:
    assert masks.assign_levels(BOXES[0], 5).tolist() == [0, 2, 4, 0]
    assert masks.assign_levels(BOXES[1], 5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("side", "level"),
    [(1, 0), (111, 0), (111.999, 0), (112, 1), (224, 2), (447.9, 2), (448, 3), (895.5, 3), (896, 4), (9e9, 4)],
)
def test_levels_change_at_powers_of_two(side: float, level: int) -> None:
    assert masks.assign_levels(torch.tensor([[0.0, 0.0, side - 1, side - 1]]), 5).item() == level
    assert masks.assign_levels(torch.tensor([[0.0, 0.0, side - 1, side - 1]]), 3).item() == min(level, 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (8,), (32, 64, 128)])
def test_equals_slow_loops(seed: int, strides: tuple[int, ...]) -> None:
    grid, boxes = sizes(strides, 96, 160), random_boxes(seed, 7)
    for kind, bump in ((masks.ground_truth, False), (masks.gaussian, True)):
        actual, expected = kind(boxes, grid), slow_masks(boxes, grid, bump)
        assert list(actual) == list(strides)
        for stride in strides:
            torch.testing.assert_close(actual[stride], expected[stride])


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([60.0, 60.0, 64.0, 64.0], {(7, 7)}),  # the last cell, whole
        ([63.0, 10.0, 64.0, 30.0], {(1, 7), (2, 7)}),
        ([64.0, 10.0, 64.0, 30.0], {(1, 7)}),  # truncates to a column behind the last
        ([10.0, 64.0, 30.0, 64.0], {(7, 1)}),
        ([64.0, 64.0, 64.0, 64.0], {(7, 7)}),
        ([70.0, 70.0, 90.0, 90.0], {(7, 7)}),
        ([-9.0, -9.0, 9.0, 9.0], {(0, 0)}),
        ([5.0, 1.0, 7.0, 60.0], {(0, 0)}),  # thin: one cell, though long
        ([30.0, 9.0, 10.0, 17.0], {(1, 3)}),  # inverted
    ],
)
def test_borders_and_thin_boxes(box: list[float], cells: set[tuple[int, int]]) -> None:
    for kind in (masks.ground_truth, masks.gaussian):
        mask = kind([torch.tensor([box])], {8: (8, 8)})[8]
        assert {(row, column) for _, row, column in mask.nonzero().tolist()} == cells


def test_the_bump_leans_right_and_overlaps_take_the_larger() -> None:
    boxes = torch.tensor([[0.0, 0.0, 32.0, 8.0], [16.0, 0.0, 32.0, 8.0]])
    row = masks.gaussian([boxes], {8: (1, 4)})[8][0, 0]
    centre = math.exp(-0.5)  # one cell high: y = 0, h/2 = 1/2
    first = [math.exp(-0.5 * ((x - 2) / 2) ** 2) * centre for x in range(4)]
    second = [0, 0, math.exp(-0.5) * centre, centre]
    assert row.tolist() == pytest.approx([max(pair) for pair in zip(first, second, strict=True)])


@pytest.mark.parametrize("psi", [0.0, 0.5, 0.9])
def test_fine_grained_equals_slow_loops(psi: float) -> None:
    grid, boxes = sizes((8, 16, 32), 96, 160), random_boxes(3, 6)
    boxes[2] = torch.tensor([[500.0, 500.0, 520.0, 520.0]])  # overlaps no anchor
    all_anchors = {stride: anchors(*size, stride, 2) for stride, size in grid.items()}
    actual, expected = (
        masks.fine_grained(boxes, all_anchors, grid, psi),
        slow_fine_grained(boxes, all_anchors, grid, psi),
    )
    for stride in grid:
        assert torch.equal(actual[stride], expected[stride])
    assert not any(mask[2].any() for mask in actual.values())


def test_pseudo_anchors_are_squares_of_eight_strides_around_each_point() -> None:
    images = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    truth = Target(torch.tensor([[8.0, 4.0, 72.0, 60.0]]), torch.tensor([1]))
    view = FCOS(["a"], backbone={"depth": 10, "width": 0.125}, neck_channels=64).view(
        Batch(images, ((64, 96),), ((64, 96),), (truth,), (1,))
    )
    pseudo = {}
    for stride, points in view.anchors.items():
        rows, columns = math.ceil(64 / stride), math.ceil(96 / stride)
        step, side = (96 // columns, 64 // rows), 4 * stride
        pseudo[stride] = torch.tensor(
            [
                [x * step[0] - side, y * step[1] - side, x * step[0] + side, y * step[1] + side]
                for y in range(rows)
                for x in range(columns)
            ],
            dtype=torch.float32,
        )
        assert points.shape == pseudo[stride].shape
    squares = masks.pseudo_anchors(view.anchors)
    assert all(torch.equal(squares[stride], boxes) for stride, boxes in pseudo.items())
    grid = sizes((8, 16), 64, 96)
    built = masks.Mask("fine_grained")(view, grid)
    expected = slow_fine_grained([truth.boxes], pseudo, grid, 0.5)
    for stride, mask in built.items():
        assert torch.equal(mask, expected[stride])
    # anchors of one stride would all lie in the box with the same IoU: the whole box, and nothing fine about it
    assert 0 < built[8].sum() < masks.fine_grained([truth.boxes], view.anchors, grid)[8].sum()


@pytest.mark.parametrize("psi", [0.0, 0.5, 0.9])
def test_fine_grained_on_all_levels_equals_slow_loops(psi: float) -> None:
    grid, boxes = sizes((8, 16, 32), 96, 160), random_boxes(4, 5)
    all_anchors = {stride: anchors(*size, stride, 2) for stride, size in grid.items()}
    actual = masks.fine_grained_all_levels(boxes, all_anchors, grid, psi)
    expected = {stride: torch.zeros(len(boxes), *size) for stride, size in grid.items()}
    for image, image_boxes in enumerate(boxes):
        for box in image_boxes.tolist():
            overlaps = {s: [iou(anchor, box) for anchor in rows.tolist()] for s, rows in all_anchors.items()}
            best = max(max(level) for level in overlaps.values())
            for stride, level in overlaps.items():
                for index, overlap in enumerate(level):
                    if overlap > psi * best:
                        row, column = divmod(index // 2, grid[stride][1])
                        expected[stride][image, row, column] = 1
    for stride in grid:
        assert torch.equal(actual[stride], expected[stride])
    assert all(mask[:2].any() and not mask[2].any() for mask in actual.values()) or psi == 0.9


def test_random_keeps_the_amount_and_moves_the_place() -> None:
    like = masks.ground_truth(random_boxes(5, 8), grid := sizes((4, 8), 96, 160))
    before = torch.get_rng_state()
    first, repeated, other = masks.random(like, [1, 2, 3]), masks.random(like, [1, 2, 3]), masks.random(like, [1, 9, 3])
    assert torch.equal(before, torch.get_rng_state())
    for stride in grid:
        assert set(first[stride].unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(first[stride].sum((1, 2)), like[stride].sum((1, 2)))
        assert torch.equal(first[stride], repeated[stride])
        assert torch.equal(first[stride][0], other[stride][0])
    assert not torch.equal(first[4], like[4])
    assert not torch.equal(first[4][1], other[4][1])


def test_random_is_uniform_over_cells() -> None:
    like = {8: torch.zeros(1, 3, 4)}
    like[8][0, 0] = 1
    total = sum(masks.random(like, [seed])[8] for seed in range(3000))
    assert isinstance(total, Tensor)
    assert (total / 3000 - 1 / 3).abs().max() < 0.04  # 4.6 standard deviations


@pytest.mark.parametrize("kind", ["ground_truth", "gaussian", "fine_grained", "fine_grained_all_levels"])
def test_values_multiply_each_box_and_the_largest_counts(kind: str) -> None:
    boxes, grid = random_boxes(7, 6), sizes((8, 16, 32), 96, 160)
    values = [
        torch.rand(len(image_boxes), generator=torch.Generator().manual_seed(index))
        for index, image_boxes in enumerate(boxes)
    ]
    view = FakeView(batch([[]] * 3, 96, 160), spec(), anchors={s: anchors(*size, s, 2) for s, size in grid.items()})
    mask = masks.Mask(kind, scale=20.0)
    actual = mask.around_boxes(boxes, values, view, grid)  # type: ignore[arg-type]
    expected = {stride: torch.zeros(3, *size) for stride, size in grid.items()}
    for image, pairs in enumerate(zip(boxes, values, strict=True)):
        for box, value in zip(*pairs, strict=True):
            alone = mask.around_boxes([box[None]], None, view, grid)  # type: ignore[arg-type]
            for stride, cells in alone.items():
                expected[stride][image] = torch.maximum(expected[stride][image], value * cells[0])
    for stride in grid:
        torch.testing.assert_close(actual[stride], expected[stride])
    assert len(actual[8].unique()) > 3


def test_random_moves_values_as_they_are() -> None:
    like = {8: torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))}
    shuffled = masks.random(like, [1, 2])[8]
    assert not torch.equal(shuffled, like[8])
    assert torch.equal(shuffled.flatten(1).sort().values, like[8].flatten(1).sort().values)


def test_the_batch_does_not_matter() -> None:
    boxes, grid = random_boxes(6, 9), sizes((4, 8, 16), 96, 160)
    for kind in (masks.ground_truth, masks.gaussian):
        whole, alone = kind(boxes, grid), [kind([image_boxes], grid) for image_boxes in boxes]
        for stride in grid:
            assert torch.equal(whole[stride], torch.cat([image_boxes[stride] for image_boxes in alone]))


@pytest.mark.parametrize("kind", masks.KINDS)
def test_build(kind: str) -> None:
    images = batch([[[3.0, 5.0, 40.0, 30.0]], []])
    grid = sizes((4, 8), 64, 64)
    view = FakeView(images, spec(), anchors={stride: anchors(*size, stride, 3) for stride, size in grid.items()})
    mask = masks.Mask(kind)(view, grid, seeds=[1, 2])
    for stride, size in grid.items():
        assert mask[stride].shape == (2, *size)
        assert mask[stride].dtype == torch.float32
        assert mask[stride].min() >= 0
        assert mask[stride].max() <= 1
    assert mask[8 if kind == "fine_grained_all_levels" else 4][0].any()
    assert bool(mask[4][1].any()) == (kind == "none")
    assert view.reads == ({"anchors"} if kind.startswith("fine_grained") else set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gt"}, "expected one of ground_truth, fine_grained"),
        ({"kind": "gaussian", "scale": 0}, "mask.scale"),
        ({"kind": "fine_grained", "threshold": 1.0}, "mask.threshold"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        masks.Mask(**options)  # type: ignore[arg-type]
