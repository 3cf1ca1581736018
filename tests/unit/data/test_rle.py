"""Run-length codes against loops over pixels; every bad form of a COCO file's segmentation is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from distill.data import rle

SIZE = (11, 7)


def random_masks(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, 1, 1, generator=generator) * 1.2 - 0.1  # some are empty, some full
    return (torch.rand(count, *size, generator=generator) < share).to(torch.uint8)


def slow_runs(mask: torch.Tensor) -> list[int]:
    """Lengths of runs of 0, 1, 0, ... down the columns; the first may be 0."""
    runs, value = [0], 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if int(mask[y, x]) != value:
                runs.append(0)
                value = 1 - value
            runs[-1] += 1
    return runs


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool])
def test_codes_hold_the_runs_of_the_columns_and_decode_to_the_mask(kind: torch.dtype) -> None:
    masks = random_masks(60)
    assert masks.flatten(1).any(1).sum() < 60
    for mask, code in zip(masks, rle.encode_masks(masks.to(kind)), strict=True):
        assert rle._decode_runs(code).tolist() == slow_runs(mask)
        decoded = rle.decode_mask(code, SIZE)
        assert decoded.dtype == torch.uint8
        assert torch.equal(decoded, mask)
        assert rle.mask_area(code, SIZE) == int(mask.sum())


def test_long_runs_and_their_differences_are_read() -> None:
    """Runs of several digits, with positive and negative differences."""
    mask = torch.zeros(700, 900, dtype=torch.uint8)
    mask[:, 100:600] = 1
    mask[3:5, 700] = 1
    mask[100:, 899] = 1
    assert rle._decode_runs(rle.encode_masks(mask[None])[0]).tolist() == slow_runs(mask)


def test_no_masks_have_no_codes() -> None:
    assert rle.encode_masks(torch.zeros(0, 5, 5, dtype=torch.bool)) == []


def test_all_forms_of_a_file_mean_the_same_mask() -> None:
    for mask, code in zip(random_masks(30, 1), rle.encode_masks(random_masks(30, 1)), strict=True):
        forms: list[Any] = [rle.to_coco(code, SIZE), {"size": list(SIZE), "counts": code}]
        forms.append({"size": list(SIZE), "counts": slow_runs(mask)})
        for form in forms:
            assert torch.equal(rle.decode_mask(rle.encode_segmentation(form, SIZE), SIZE), mask)


def test_polygons_fill_the_pixels_inside_and_are_joined() -> None:
    """Corners on pixel edges: what is filled can be counted by hand."""
    first, second = [1, 2, 4, 2, 4, 6, 1, 6], [3.0, 4.0, 6.0, 4.0, 6.0, 10.0, 3.0, 10.0]
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    expected[2:6, 1:4] = 1
    assert torch.equal(rle.decode_mask(rle.encode_segmentation([first], SIZE), SIZE), expected)
    expected[4:10, 3:6] = 1
    assert torch.equal(rle.decode_mask(rle.encode_segmentation([first, second], SIZE), SIZE), expected)
    over_the_edge = [-3, -3, 2, -3, 2, 30, -3, 30]
    assert int(rle.decode_mask(rle.encode_segmentation([over_the_edge], SIZE), SIZE).sum()) == 2 * 11


def test_polygons_are_filled_as_the_reference_fills_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        polygons = [(rng.random(2 * rng.integers(3, 9)) * 60).tolist() for _ in range(rng.integers(1, 4))]
        expected = coco.decode(coco.merge(coco.frPyObjects(polygons, 50, 60)))
        assert np.array_equal(rle.decode_mask(rle.encode_segmentation(polygons, (50, 60)), (50, 60)).numpy(), expected)


BAD: list[tuple[Any, str]] = [
    (None, "polygons or run lengths"),
    ([], "polygons or run lengths"),
    ("1,2,3", "polygons or run lengths"),
    (3, "polygons or run lengths"),
    ([[1, 2, 3, 4]], "three or more corners"),  # pycocotools would take it for a box
    ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]], "three or more corners"),
    ([[1, 2, 3, 4, 5, 6, 7]], "three or more corners"),
    ([1, 2, 3, 4, 5, 6], "three or more corners"),
    ([[[1, 2], [3, 4], [5, 6]]], "three or more corners"),
    ([[[1, 2], [3, 4, 5]]], "three or more corners"),
    ([["1", "2", "3", "4", "5", "6"]], "three or more corners"),
    ([[1, 2, None, 4, 5, 6]], "three or more corners"),
    ([[1, 2, float("nan"), 4, 5, 6]], "far outside"),
    ([[1, 2, 1e7, 4, 5, 6]], "far outside"),  # a second of work for every one of them
    ({}, "'size'"),
    ({"size": [7, 11], "counts": [77]}, "'size'"),  # width and height swapped
    ({"size": [11, 7]}, "'counts'"),
    ({"size": [11, 7], "counts": []}, "'counts'"),
    ({"size": [11, 7], "counts": [1.5, 75.5]}, "'counts'"),
    ({"size": [11, 7], "counts": [5, 5]}, "do not add up"),  # the rest would be whatever lies in memory
    ({"size": [11, 7], "counts": [5, 500]}, "do not add up"),
    ({"size": [11, 7], "counts": [-1, 78]}, "do not add up"),
    ({"size": [11, 7], "counts": [2**62] * 4 + [77]}, "do not add up"),
    ({"size": [11, 7], "counts": ""}, "no run-length code"),
    ({"size": [11, 7], "counts": "garbage!"}, "no run-length code"),
    ({"size": [11, 7], "counts": "Pé"}, "no run-length code"),
    ({"size": [11, 7], "counts": "P"}, "no run-length code"),  # says that another digit follows
    ({"size": [11, 7], "counts": "oooooooooooo1"}, "no run-length code"),
    ({"size": [11, 7], "counts": "52203"}, "do not add up"),
]


@pytest.mark.parametrize(("segmentation", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_no_mask_is_refused(segmentation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rle.encode_segmentation(segmentation, SIZE)
