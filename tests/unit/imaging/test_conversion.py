"""Images of all kinds as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.imaging.conversion import as_tensor
from distill.types import DistillError


def test_a_phones_picture_is_turned_upright() -> None:
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    picture.getexif()[0x0112] = 6
    turned = as_tensor(picture)
    assert turned.shape == (3, 4, 2)
    assert turned[0, 0, 1] == 255


def test_gray_images_get_three_channels() -> None:
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert all(torch.equal(channel, torch.from_numpy(gray)) for channel in as_tensor(gray))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"image 2: expected .* got ndarray of shape \(4, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4), "got Tensor of shape"),
        (torch.full((3, 4, 4), 128.0), "floats from 0 to 1"),
        (torch.full((3, 4, 4), float("nan")), "floats from 0 to 1"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "got torch.int32"),
        (7, "got int"),
        (Path("missing.jpg"), "missing.jpg"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(image: Any, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        as_tensor(image, 2)
