import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import max_pool2d

from distill.data import rle
from distill.data.augment import Augmentation, LoadedImage
from distill.data.transforms import Sample, Transform
from distill.types import DistillError, Size, Target

KINDS = {
    "zoom_out": {"zoom_out": 1.0},
    "iou_crop": {"iou_crop": 1.0},
    "scale_jitter": {"scale_jitter": [0.4, 2.5]},
    "mosaic": {"mosaic": 1.0},
    "all": {"mosaic": 0.5, "zoom_out": 0.5, "iou_crop": 0.5, "scale_jitter": [0.4, 2.5]},
}
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def painted(number: int, cached: Size | None = None) -> LoadedImage:
    """Image `number` of four: an L of its own color, with its box and its mask, or the same image resized before."""
    height, width = [(90, 120), (100, 140), (120, 80), (96, 96)][number]
    left, top, right, bottom = [(20, 15, 70, 60), (90, 40, 139, 99), (5, 50, 60, 110), (0, 0, 50, 96)][number]
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[0, top:bottom, left:right] = 1
    mask[0, top : (top + bottom) // 2, (left + right) // 2 : right] = 0
    image = mask * torch.tensor(COLORS[number], dtype=torch.uint8).view(3, 1, 1)
    target = Target(torch.tensor([[left, top, right, bottom]], dtype=torch.float32), torch.tensor([number + 1]))
    if cached is not None:
        image = Transform((cached[0],), cached[1]).resize(image)
    return LoadedImage(image, target, (height, width), rle.encode_masks(mask))


def augmented(transform: Transform, images: list[LoadedImage], image_id: int = 0, epoch: int = 0) -> Sample:
    first, *others = images
    partners = others if transform.draw_partners(image_id, epoch, 100) else []
    return transform(first.image, first.target, first.original_size, image_id, epoch, first.codes, partners)


def pixels_of(image: torch.Tensor, number: int) -> torch.Tensor:
    """The pixels (h, w) that are nearer to this color than to black or to another color."""
    return ((image > 127) == (torch.tensor(COLORS[number]) > 127).view(3, 1, 1)).all(dim=0)


def grown(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return max_pool2d(mask[None].float(), 2 * pixels + 1, stride=1, padding=pixels)[0] > 0


@pytest.mark.parametrize(
    ("kind", "cached"),
    [
        *[(kind, None) for kind in KINDS],
        *[pytest.param(kind, (70, 110), marks=pytest.mark.exhaustive) for kind in KINDS if kind != "all"],
        ("all", (70, 110)),
    ],
)
def test_boxes_and_masks_follow_the_pixels(kind, cached):
    """Within a pixel of the image that is enlarged, so within more pixels of the result for an image resized before."""
    near = 1.1 if cached is None and kind != "all" else 4
    transform = Transform((60, 80), 110, flip=0.5, augment=Augmentation(fill=(0, 0, 0), min_visible=0, **KINDS[kind]))
    images = [painted(number, cached) for number in range(4)]
    seen = 0
    for image_id in range(16):
        sample = augmented(transform, images[image_id % 4 :] + images[: image_id % 4], image_id)
        height, width = sample.image.shape[-2:]
        assert sample.target.masks.shape == (len(sample.target.boxes), height, width)
        assert set(sample.target.masks.unique().tolist()) <= {0, 1}
        kept = dict(zip(sample.target.labels.tolist(), range(4), strict=False))
        assert len(kept) == len(sample.target.labels)
        for number in range(4):
            pixels = pixels_of(sample.image, number)
            if number + 1 not in kept:
                if "iou_crop" not in KINDS[kind]:  # the crop drops boxes whose center is outside
                    assert not pixels[2:-2, 2:-2].any() or "mosaic" in KINDS[kind]
                continue
            seen += 1
            box, mask = (part[kept[number + 1]] for part in (sample.target.boxes, sample.target.masks.bool()))
            # The longest row and column of the L end at the box, unless the L is cut: then the box may be larger.
            rows, columns = pixels.any(dim=1).nonzero().flatten(), pixels.any(dim=0).nonzero().flatten()
            tight = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (box[:2] <= tight[:2] + near).all()
            assert (box[2:] >= tight[2:] - near).all()
            inside = (box[:2] > 0).all() and box[2] < width and box[3] < height
            if inside and kind in ("zoom_out", "scale_jitter", "iou_crop"):
                assert (box - tight).abs().max() <= near
            reach, inner = math.ceil(near), slice(math.ceil(near), -math.ceil(near))
            assert not (mask & ~grown(pixels, reach))[inner, inner].any()
            assert not (pixels & ~grown(mask, reach))[inner, inner].any()
    assert seen >= 8


def test_the_box_of_a_filled_rectangle_stays_tight_however_it_is_cut():
    """In a mosaic, and under all augmentations together."""
    images = []
    for number in range(4):
        loaded = painted(number)
        left, top, right, bottom = loaded.target.boxes[0].int().tolist()
        loaded.image[:, top:bottom, left:right] = torch.tensor(COLORS[number], dtype=torch.uint8).view(3, 1, 1)
        images.append(loaded._replace(codes=None))
    for kind in ("mosaic", "all", "scale_jitter"):
        transform = Transform((80,), 110, flip=0.5, augment=Augmentation(fill=(0, 0, 0), **KINDS[kind]))
        labels = []
        for image_id in range(20):
            sample = augmented(transform, images, image_id)
            labels += sample.target.labels.tolist()
            for box, label in zip(sample.target.boxes, sample.target.labels.tolist(), strict=True):
                rows, columns = pixels_of(sample.image, label - 1).nonzero(as_tuple=True)
                tight = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (box - tight).abs().max() <= 1.01, (kind, image_id, box, tight)
        assert kind == "scale_jitter" or set(labels) == {1, 2, 3, 4}


def test_a_mosaic_has_four_images_of_half_size_and_the_shape_of_the_first():
    images = [painted(number)._replace(codes=None) for number in range(4)]
    transform = Transform((90,), 140, augment=Augmentation(mosaic=1.0, min_visible=0.9, fill=(0, 0, 0)))
    for image_id in range(10):
        sample = augmented(transform, images, image_id)
        assert sample.image.shape[-2:] == (90, 120)
        assert sample.original_size == (90, 120)
        assert sample.id == image_id
        for box, label in zip(sample.target.boxes, sample.target.labels.tolist(), strict=True):
            loaded = images[label - 1]
            scale = 90 / min(loaded.original_size) / 2
            before = loaded.target.boxes[0] * scale
            if (box[:2] > 1).all() and box[2] < 119 and box[3] < 89:
                assert ((box[2:] - box[:2]) >= 0.9 * (before[2:] - before[:2]) - 1).all()
                assert ((box[2:] - box[:2]) <= (before[2:] - before[:2]) + 1).all()


def test_zoom_out_and_scale_jitter_keep_to_their_ranges():
    loaded = painted(0)._replace(codes=None)
    areas = {}
    for kind in ({"zoom_out": 1.0, "zoom_out_max": 2.0}, {"scale_jitter": [0.5, 1.0]}, {"scale_jitter": [1.0, 2.0]}):
        samples = [augmented(Transform((90,), 120, augment=Augmentation(**kind)), [loaded], i) for i in range(40)]
        sizes = torch.tensor([sample.image.shape[-2:] for sample in samples])
        widths = torch.cat([sample.target.boxes[:, 2] - sample.target.boxes[:, 0] for sample in samples]) / 50
        areas[str(kind)] = (sizes.min(0).values.tolist(), sizes.max(0).values.tolist(), widths.min(), widths.max())
    (zoomed, smaller, larger) = areas.values()
    assert [89, 119] <= zoomed[0] <= zoomed[1] <= [90, 120]
    assert 0.48 < zoomed[2] < 0.6 < 0.9 < zoomed[3] <= 1.01
    assert [45, 60] <= smaller[0] <= [50, 67]
    assert [85, 113] <= smaller[1] <= [90, 120]
    assert larger[:2] == ([90, 120], [90, 120])
    assert 1.8 < larger[3] <= 2.01


def test_cropped_images_keep_their_orientation():
    transform = Transform((64,), 128, augment=Augmentation(iou_crop=1.0))
    for number, is_upright in ((0, False), (2, True), (3, False)):
        shapes = [augmented(transform, [painted(number)], image_id).image.shape[-2:] for image_id in range(10)]
        assert len(set(shapes)) > 3
        assert all((height > width) <= is_upright and (height < width) <= (not is_upright) for height, width in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_an_augmentation_that_is_not_drawn_changes_nothing(kind):
    """Nor does one that has stopped, which photometric distortion does at the same epoch."""
    loaded = painted(0)
    plain, never, stopped = (
        Transform((60, 70, 80), 110, flip=0.5, photometric=photometric, augment=Augmentation(**options))
        for photometric, options in (
            (False, {}),
            (False, {"mosaic": 1e-12, "zoom_out": 1e-12, "iou_crop": 1e-12}),
            (True, KINDS[kind] | {"stop_epoch": 2}),
        )
    )
    for image_id in range(8):
        wanted = augmented(plain, [loaded], image_id, epoch=2)
        for transform in (never, stopped):
            sample = augmented(transform, [loaded] * 4, image_id, epoch=2)
            assert torch.equal(sample.image, wanted.image)
            assert torch.allclose(sample.target.boxes, wanted.target.boxes, atol=1e-4)
            assert torch.equal(sample.target.masks, wanted.target.masks)
        assert torch.equal(sample.target.boxes, wanted.target.boxes)
    before = [augmented(stopped, [painted(n) for n in range(4)], image_id, epoch=1) for image_id in range(8)]
    assert any(not torch.equal(a.image, augmented(plain, [loaded], a.id, epoch=1).image) for a in before)


def test_one_augmentation_leaves_the_draws_of_another_alone():
    images = [painted(number)._replace(codes=None) for number in range(4)]
    alone = Transform((80,), 110, augment=Augmentation(zoom_out=1.0, fill=(9, 9, 9)))
    both = replace(alone, augment=replace(alone.augment, mosaic=0.5))
    samples = [(augmented(alone, images, image_id), augmented(both, images, image_id)) for image_id in range(30)]
    is_equal = [torch.equal(a.image, b.image) for a, b in samples]
    assert 5 < sum(is_equal) < 25  # those without a mosaic


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 4), (1, 300), (300, 1)])
@pytest.mark.parametrize("box", [None, (0.0, 0.0, 1.0, 1.0)])
def test_tiny_images_and_images_without_boxes_survive(size, box):
    boxes = torch.tensor([] if box is None else [box]).reshape(-1, 4)
    codes = rle.encode_masks(torch.ones(len(boxes), *size, dtype=torch.uint8))
    target = Target(boxes, torch.ones(len(boxes), dtype=torch.int64))
    loaded = LoadedImage(torch.zeros(3, *size, dtype=torch.uint8), target, size, codes)
    for image_id in range(2):
        for kind in KINDS.values():
            sample = augmented(Transform((32,), 64, flip=0.5, augment=Augmentation(**kind)), [loaded] * 4, image_id)
            assert sample.target.masks.shape == (len(sample.target.boxes), *sample.image.shape[-2:])
            assert sample.target.labels.dtype == torch.int64
            assert max(sample.image.shape[-2:]) <= 64


def test_a_cut_that_leaves_a_box_without_a_pixel_of_its_mask_drops_the_box():
    mask = torch.zeros(1, 100, 100, dtype=torch.uint8)
    mask[0, 90:, :] = mask[0, :, 90:] = 1  # the box is the image, and most crops have nothing of the mask
    loaded = LoadedImage(
        torch.zeros(3, 100, 100, dtype=torch.uint8),
        Target(torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([1])),
        (100, 100),
        rle.encode_masks(mask),
    )
    transform = Transform((100,), 100, augment=Augmentation(scale_jitter=[3.0, 3.0], min_visible=0.0))
    counts = [
        augmented(transform, [loaded], image_id).target.masks.bool().flatten(1).any(1).tolist()
        for image_id in range(30)
    ]
    assert [] in counts
    assert [True] in counts
    assert [False] not in counts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("mosaic", 1.5), ("zoom_out", -0.1), ("iou_crop", float("nan")), ("zoom_out_max", 0.5), ("min_visible", 2)],
        *[("scale_jitter", [2.0, 0.5]), ("scale_jitter", [1.0]), ("scale_jitter", [0.0, 1.0]), ("fill", [1, 2])],
        *[("fill", [0, 0, 256]), ("stop_epoch", -1)],
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(DistillError, match=rf"data\.augment\.{name}: expected .*, got"):
        Augmentation(**{name: value})
