import io
import pickle
import random
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from distill.data.augment import Augmentation
from distill.data.transforms import Transform, collate, flip_boxes
from distill.imaging.resizing import padded_size, resize_boxes, resize_image, resized_size
from distill.types import DistillError, Target


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def target(*boxes: list[float]) -> Target:
    return Target(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.arange(1, len(boxes) + 1))


def make(transform: Transform, image_id: int = 3, epoch: int = 0, size: tuple[int, int] = (40, 60)):
    return transform(picture(*size), target([3, 4, 20, 30], [0, 0, 60, 40]), size, image_id, epoch)


def test_size_and_boxes_are_torchvisions_for_many_sizes():
    rng = random.Random(0)
    for _ in range(150):
        height, width = rng.randint(20, 300), rng.randint(20, 300)
        min_size = rng.randint(32, 200)
        max_size = rng.randint(min_size, 300)
        theirs = GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3).eval()
        box = torch.tensor([[1.5, 2.25, rng.uniform(5, width), rng.uniform(5, height)]])
        images, targets = theirs([torch.zeros(3, height, width)], [{"boxes": box, "labels": torch.ones(1).long()}])
        ours = Transform((min_size,), max_size)(
            picture(height, width), Target(box, torch.ones(1).long()), (height, width), 0, 0
        )
        assert tuple(ours.image.shape[-2:]) == images.image_sizes[0]
        assert padded_size(images.image_sizes, 32) == tuple(images.tensors.shape[-2:])
        assert torch.equal(ours.target.boxes, targets[0]["boxes"])


def test_pixels_are_torchvisions_to_a_grey_level():
    image = picture(90, 131)
    theirs = GeneralizedRCNNTransform(64, 100, [0.0] * 3, [1.0] * 3).eval()
    wanted = theirs([image.float()])[0].tensors[0]
    ours = resize_image(image, resized_size((90, 131), 64, 100))
    _, height, width = ours.shape
    assert (ours.float() - wanted[:, :height, :width]).abs().max() < 1.01
    assert (ours.float() - wanted[:, :height, :width]).mean().abs() < 0.02


def test_antialias_is_an_option():
    image = picture(200, 200)
    assert resize_image(image, (50, 50), True).float().std() < resize_image(image, (50, 50), False).float().std()


def test_a_long_thin_image_keeps_a_pixel():
    assert resized_size((1, 1000), 32, 64) == (1, 64)


def test_flip_moves_boxes_with_their_pixels():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 4:30, 3:20] = 255
    flipped = Transform((40,), 60, flip=1.0)(image, target([3, 4, 20, 30]), (40, 60), 0, 0)
    ys, xs = torch.nonzero(flipped.image[0], as_tuple=True)
    assert flipped.target.boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
    boxes = torch.rand(9, 4)
    assert torch.allclose(flip_boxes(flip_boxes(boxes, 7), 7), boxes, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_mirroring_commutes_with_the_resize(antialias):
    rng = random.Random(0)
    exact = torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )  # elsewhere torch resizes uint8 by way of floats
    for _ in range(150):
        size, new = ((rng.randint(1, 90), rng.choice([rng.randint(1, 300), 64, 128])) for _ in range(2))
        planar = picture(*size)
        for each in (planar, planar.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            wanted = resize_image(each, new, antialias).flip(-1)
            found = resize_image(each, new, antialias, mirrored=True)
            assert (found.int() - wanted.int()).abs().max() <= (0 if exact else 1), (size, new)


def test_scaled_boxes_follow_each_axis():
    boxes = resize_boxes(torch.tensor([[0.0, 0.0, 60.0, 40.0]]), (40, 60), (27, 41))
    assert torch.allclose(boxes, torch.tensor([[0.0, 0.0, 41.0, 27.0]]))


def test_draws_depend_on_seed_epoch_and_image_alone():
    transform = Transform((24, 32, 40), 90, flip=0.5, photometric=True, seed=5)
    before = [make(transform, image, epoch) for image in range(6) for epoch in range(4)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(transform))
    after = [make(again, image, epoch) for epoch in reversed(range(4)) for image in reversed(range(6))]
    by_key = {(i // 4, i % 4): sample for i, sample in enumerate(before)}
    keys = [(image, epoch) for epoch in reversed(range(4)) for image in reversed(range(6))]
    for key, sample in zip(keys, after, strict=True):
        assert torch.equal(sample.image, by_key[key].image)
        assert torch.equal(sample.target.boxes, by_key[key].target.boxes)
    assert len({sample.image.shape for sample in before}) == 3


@pytest.mark.parametrize("changed", [{"seed": 6}, {"epoch": 1}, {"image_id": 2**40}])
def test_each_of_seed_epoch_and_image_matters(changed):
    def draws(seed: int = 5, epoch: int = 0, image_id: int = 7) -> list[tuple]:
        transform = Transform(tuple(range(24, 40)), 90, flip=0.5, seed=seed)
        samples = [make(transform, image_id + n, epoch) for n in range(12)]
        return [(sample.image.shape, sample.target.boxes.tolist()) for sample in samples]

    assert draws() != draws(**changed)


def test_images_64_bit_and_negative_ids_have_streams_of_their_own():
    transform = Transform(tuple(range(20, 60)), 90)
    shapes = [make(transform, image_id).image.shape for image_id in (0, 1, 2**32, 2**62, -1, -(2**60))]
    assert len(set(shapes)) > 3


def test_flips_come_with_their_probability():
    transform = Transform((40,), 60, flip=0.3)
    plain = make(Transform((40,), 60)).image
    flipped = sum(not torch.equal(make(transform, image).image, plain) for image in range(400))
    assert 0.2 < flipped / 400 < 0.4


def test_switching_photometric_on_leaves_sizes_and_flips_alone():
    plain, coloured = (Transform((24, 32, 40), 90, flip=0.5, photometric=on) for on in (False, True))
    pairs = [(make(plain, image), make(coloured, image)) for image in range(40)]
    assert all(torch.equal(a.target.boxes, b.target.boxes) and a.image.shape == b.image.shape for a, b in pairs)
    changed = sum(not torch.equal(a.image, b.image) for a, b in pairs)
    assert changed > 25
    assert all(b.image.dtype == torch.uint8 for _, b in pairs)


def test_boxes_that_vanish_are_dropped_with_their_labels():
    sample = Transform((10,), 20)(
        picture(400, 400), target([1, 1, 1.2, 50], [5, 5, 100, 100], [7, 7, 7, 7]), (400, 400), 0, 0
    )
    assert sample.target.labels.tolist() == [2]


def test_an_image_without_boxes_is_survived():
    sample = Transform((32,), 64, flip=1.0, photometric=True)(picture(50, 40), target(), (50, 40), 0, 0)
    assert sample.target.boxes.shape == (0, 4)
    assert sample.target.labels.dtype == torch.int64


def test_collate_pads_right_and_below_with_zeros():
    transform = Transform((40,), 100)
    samples = [make(transform, 1, size=(40, 60)), make(transform, 2**40, size=(80, 50))]
    batch = collate(samples, pad_to=32)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes == ((40, 60), (64, 40))
    assert batch.original_sizes == ((40, 60), (80, 50))
    assert batch.ids == (1, 2**40)
    for image, sample, (height, width) in zip(batch.images, samples, batch.sizes, strict=True):
        assert torch.equal(image[:, :height, :width], sample.image)
        assert image[:, height:].sum() == 0
        assert image[:, :, width:].sum() == 0


def test_bad_options_are_refused():
    with pytest.raises(DistillError, match=r"min_size=\[800\], max_size=640"):
        Transform((800,), 640)
    with pytest.raises(DistillError, match=r"data\.flip"):
        Transform((32,), 64, flip=2)


def test_a_batch_lies_with_its_channels_last_and_is_zero_in_its_padding_whatever_lay_there_before():
    samples = [make(Transform((side,), 99), size=size) for side, size in ((40, (40, 60)), (33, (70, 50)))]
    for _ in range(3):
        dirt = [torch.full((2, 3, 64, 64), 255, dtype=torch.uint8) for _ in range(9)]
        del dirt  # the allocator gives this memory again
        images = collate(samples, 32).images
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, sample in zip(images, samples, strict=True):
            wanted = torch.zeros(image.shape, dtype=torch.uint8)
            _, height, width = sample.image.shape
            wanted[:, :height, :width] = sample.image
            assert torch.equal(image, wanted)


def test_a_target_is_pickled_without_shared_tensors():
    before = Target(torch.rand(3, 4), torch.tensor([3, 1, 2]), torch.ones(3, 5, 6, dtype=torch.uint8))
    after = pickle.loads(pickle.dumps(before))
    assert torch.equal(after.boxes, before.boxes)
    assert torch.equal(after.labels, before.labels)
    assert torch.equal(after.masks, before.masks)
    after.boxes.add_(1)  # its own memory, which can be written
    empty = pickle.loads(pickle.dumps(Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))))
    assert (empty.boxes.shape, empty.labels.dtype, empty.masks) == ((0, 4), torch.int64, None)
    attached = Target(torch.rand(3, 4, requires_grad=True), before.labels)
    assert torch.equal(pickle.loads(pickle.dumps(attached)).boxes, attached.boxes)
    content = io.BytesIO()
    sent = ForkingPickler(content)
    shared = []
    sent.dispatch_table[torch.Tensor] = lambda tensor: shared.append(tensor.shape) or (torch.empty, (0,))
    sent.dump(before)
    assert shared == [(3, 5, 6)]


def test_a_square_resize_scales_each_axis_on_its_own():
    """Images of one batch have one size, so that none of them is padded."""
    transform, image = Transform((64,), 96, flip=0.0, shape="square"), torch.zeros(3, 50, 200, dtype=torch.uint8)
    target = Target(torch.tensor([[20.0, 10.0, 100.0, 40.0]]), torch.tensor([1]))
    sample = transform(image, target, (50, 200), 7, 0)
    assert sample.image.shape == (3, 64, 64)
    assert torch.allclose(sample.target.boxes, torch.tensor([[20 * 0.32, 10 * 1.28, 100 * 0.32, 40 * 1.28]]))
    assert transform.resize(image).shape == (3, 64, 64)
    batch = collate([sample, transform(torch.zeros(3, 90, 30, dtype=torch.uint8), target, (90, 30), 8, 0)])
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.sizes == ((64, 64), (64, 64))


def test_a_square_resize_refuses_what_makes_sizes_differ():
    for options in ({"min_sizes": (64, 96)}, {"augment": Augmentation(mosaic=0.5)}):
        with pytest.raises(DistillError, match=r"data\.resize=square: all images of a batch need one size"):
            Transform(**{"min_sizes": (64,), "max_size": 96, "shape": "square", **options})
    with pytest.raises(DistillError, match=r"data\.resize: expected ratio or square, got 'circle'"):
        Transform((64,), 96, shape="circle")
    augment = Augmentation(zoom_out=1.0, iou_crop=1.0)
    transform = Transform((64,), 64, shape="square", augment=augment)
    target = Target(torch.tensor([[20.0, 10.0, 100.0, 40.0]]), torch.tensor([1]))
    sizes = {
        transform(torch.zeros(3, 50, 200, dtype=torch.uint8), target, (50, 200), image, 0).image.shape
        for image in range(20)
    }
    assert sizes == {(3, 64, 64)}
