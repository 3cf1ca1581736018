"""Crops: equal to a slow loop, blind to padding and to the other images, with a gradient to the corners of boxes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.losses.crops import crops
from helpers.slow_oracles import slow_crop

SIZES = ((20, 30), (24, 17), (9, 32))
BOXES = [
    (0, [3.2, 4.1, 17.7, 15.4]),
    (2, [0.0, 0.0, 32.0, 9.0]),
    (1, [-5.0, -3.0, 40.0, 50.0]),  # clamped to the image
    (0, [29.0, 18.5, 45.0, 21.0]),
    (1, [6.0, 7.0, 6.4, 7.3]),
    (2, [31.8, 8.9, 31.9, 8.95]),
]


def images(dtype: torch.dtype = torch.float64, padding: float = math.nan) -> Tensor:
    made = torch.full((len(SIZES), 2, 24, 32), padding, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for index, (height, width) in enumerate(SIZES):
        made[index, :, :height, :width] = torch.randn(2, height, width, generator=generator, dtype=torch.float64)
    return made


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_equals_a_slow_loop(dtype: torch.dtype, error: float) -> None:
    pictures = images(dtype, padding=1e3)
    owner, boxes = torch.tensor([index for index, _ in BOXES]), torch.tensor([box for _, box in BOXES])
    cut = crops(pictures, SIZES, boxes, owner, 5)
    assert cut.shape == (len(BOXES), 2, 5, 5)
    assert cut.dtype == dtype
    for crop, (index, box) in zip(cut, BOXES, strict=True):
        box = torch.tensor(box).tolist()  # as float32 holds it
        torch.testing.assert_close(crop.double(), slow_crop(pictures[index], SIZES[index], box, 5), rtol=0, atol=error)


def test_sees_neither_padding_nor_the_other_images() -> None:
    """A weight of exactly zero times NaN would be NaN, so the padding is only made large."""
    whole = torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    for index, (height, width) in enumerate(SIZES):
        alone = images(padding=0)[index : index + 1, :, :height, :width]
        expected = crops(alone, [(height, width)], whole, torch.tensor([0]), 7)
        cut = crops(images(padding=1e6), SIZES, whole, torch.tensor([index]), 7)
        torch.testing.assert_close(cut, expected, rtol=0, atol=1e-7)


def test_an_image_s_own_pixels_are_found_at_its_own_size() -> None:
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    cut = crops(image, [(8, 8)], torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0]), 8)
    torch.testing.assert_close(cut, image)


def test_gradient_of_the_box_is_that_of_its_samples() -> None:
    owner, boxes = torch.tensor([0, 1]), torch.tensor([[3.21, 4.13, 17.7, 15.4], [2.2, 1.3, 9.1, 20.7]]).double()

    def crop(box: Tensor) -> Tensor:
        return crops(images(padding=0), SIZES, box, owner, 4)

    assert torch.autograd.gradcheck(crop, boxes.requires_grad_(), eps=1e-7, atol=1e-5)


def test_no_box_and_a_box_without_area_are_survived() -> None:
    nothing = torch.zeros(0, 4, requires_grad=True)
    assert crops(images(padding=0), SIZES, nothing, torch.zeros(0, dtype=torch.int64), 4).shape == (0, 2, 4, 4)
    point = torch.tensor([[50.0, 50.0, 50.0, 50.0], [9.0, 9.0, 4.0, 4.0]], requires_grad=True)
    cut = crops(images(torch.float32, padding=0), SIZES, point, torch.tensor([1, 0]), 4)
    cut.sum().backward()
    assert cut.isfinite().all()
    assert point.grad is not None
    assert point.grad.isfinite().all()
