from __future__ import annotations

import pytest
import torch

from distill.export.resize_graph import resize_pixels, resized_sides
from distill.imaging.resizing import resize_image, resized_size


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (97, 203), (1, 90), (480, 640)])
def test_resize_gives_the_pixels_of_the_loaders(size: tuple[int, int], antialias: bool) -> None:
    generator = torch.Generator().manual_seed(size[0])
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    new = resized_size(size, 96, 160)
    found = resize_pixels(image[None].float(), *map(torch.tensor, new), antialias)[0]
    expected = resize_image(image, new, antialias)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(found.to(torch.uint8), expected)
    else:  # other processors resize in float32
        assert float((found - expected.float()).abs().max()) <= 2


def test_sides_are_those_of_python_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width, low in torch.randint(1, 3000, (300, 3), generator=generator).tolist():
        sides = resized_sides(torch.tensor([height, width]), low, low + 200)
        assert tuple(map(int, sides)) == resized_size((height, width), low, low + 200)
