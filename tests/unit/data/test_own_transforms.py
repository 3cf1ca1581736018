import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from distill.data import rle
from distill.data.transforms import Sample, Transform
from distill.types import DistillError, Target

SIZE = (40, 60)
BOX = [10, 5, 30, 25]


def sample(*transforms, image_id: int = 0, epoch: int = 0, image: torch.Tensor | None = None, **options) -> Sample:
    mask = torch.zeros(1, *SIZE, dtype=torch.uint8)
    mask[0, 5:25, 10:30] = 1
    image = mask.expand(3, *SIZE) * 200 if image is None else image
    target = Target(torch.tensor([BOX], dtype=torch.float32), torch.tensor([3]))
    transform = Transform((40,), 60, transforms=transforms, **options)
    return transform(image, target, SIZE, image_id, epoch, rle.encode_masks(mask))


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomHorizontalFlip(1.0),
        v2.RandomVerticalFlip(1.0),
        v2.RandomZoomOut(p=1.0),
        v2.RandomIoUCrop(),
        v2.ScaleJitter((60, 60)),
        v2.Compose([v2.ConvertBoundingBoxFormat("CXCYWH"), v2.RandomResizedCrop(50), v2.SanitizeBoundingBoxes()]),
        v2.RandomApply([v2.Pad(7)], p=0.5),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_transforms_of_torchvision_move_boxes_and_masks_with_the_pixels(transform):
    kept = 0
    for image_id in range(12):
        made = sample(transform, image_id=image_id)
        assert type(made.image) is type(made.target.boxes) is type(made.target.masks) is torch.Tensor
        for box, mask in zip(made.target.boxes, made.target.masks, strict=True):
            rows, columns = (made.image[0] > 100).nonzero(as_tuple=True)
            tight = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - tight).abs().max() <= 1.5
            assert (mask.bool() ^ (made.image[0] > 100)).sum() <= mask.shape[0] + mask.shape[1]
            kept += 1
    assert kept >= 6


def test_draws_depend_on_seed_epoch_and_image_and_leave_global_streams_alone():
    def noise(image, target):
        values = [torch.rand(1).item(), np.random.rand(), random.random()]
        return image, target | {"boxes": target["boxes"] + torch.tensor([*values, 0])}

    def boxes(seed: int = 0, epoch: int = 0, image_id: int = 7) -> list[float]:
        return sample(noise, seed=seed, epoch=epoch, image_id=image_id).target.boxes.flatten().tolist()

    states = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    first = boxes()
    assert [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()] == states
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert boxes() == first
    for changed in ({"seed": 1}, {"epoch": 1}, {"image_id": 8}):
        assert all(a != b for a, b in zip(boxes(**changed)[:3], first, strict=False))


def test_a_failed_transform_restores_the_global_streams():
    def fail(image, target):
        torch.rand(1)
        raise KeyError("no such thing")

    state = torch.get_rng_state()
    with pytest.raises(DistillError, match=r"data\.transforms\[1\] \(fail\) failed for image 9: KeyError"):
        sample(v2.Identity(), fail, image_id=9)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transform_may_change_the_image_in_place():
    image = torch.full((3, *SIZE), 9, dtype=torch.uint8)

    def blacken(image, target):
        image[:] = 0
        return image, target

    assert sample(blacken, image=image).image.sum() == 0
    assert (image == 9).all()


def test_boxes_are_clipped_and_degenerate_ones_dropped():
    def change(image, target):
        boxes = torch.tensor([[-5.0, -5, 20, 90], [4, 4, 4, 9], [70, 1, 80, 9]])
        return image, {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": target["masks"].repeat(3, 1, 1)}

    made = sample(change)
    assert made.target.boxes.tolist() == [[0, 0, 20, 40]]
    assert made.target.labels.tolist() == [1]
    assert len(made.target.masks) == 1


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image, target: image, "expected a result"),
        (
            v2.ToDtype(torch.float32, scale=True),
            r"expected an image \(3, h, w\) uint8, got \(3, 40, 60\) torch.float32",
        ),
        (v2.Grayscale(1), r"expected an image .* got \(1, 40, 60\)"),
        (lambda image, target: (image[:, :0], target), "at least one pixel"),
        (lambda image, target: (image, {}), r"target\['boxes'\].* got None"),
        (lambda image, target: (image, target | {"boxes": target["boxes"] * torch.nan}), r"finite"),
        (lambda image, target: (image, target | {"labels": target["labels"][:0]}), r"target\['labels'\] \(1,\)"),
        (lambda image, target: (image, target | {"labels": target["labels"] * 0}), "from 1"),
        (lambda image, target: (image[:, 1:], target), r"target\['masks'\] \(1, 39, 60\), got \(1, 40, 60\)"),
    ],
)
def test_what_a_transform_may_not_return(transform, message):
    with pytest.raises(DistillError, match=rf"data\.transforms\[0\] \([\w<>]+\): .*{message}"):
        sample(transform)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([1], r"data\.transforms\[0\]: expected a callable .* got 1"),
        ([v2.Identity(), v2.RandomGrayscale], r"data\.transforms\[1\]: expected a callable .* got <class"),
        (v2.Identity(), r"data\.transforms: expected a list"),
        ("abc", r"data\.transforms: expected a list .* got 'abc'"),
    ],
)
def test_a_value_that_is_no_list_of_callables_is_refused(transforms, message):
    with pytest.raises(DistillError, match=message):
        Transform((40,), 60, transforms=transforms)
