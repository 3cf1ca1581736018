import math

import numpy as np
import pytest
import torch

from distill.data import shapes
from distill.data.shapes import CLASSES, MIN_CONTRAST, MIN_VISIBLE, NEAR_MISSES, Shapes, draw_scene, render_shape
from distill.types import DistillError

SIZE = (128, 128)


def scenes(count: int):
    return [draw_scene(np.random.default_rng(index), SIZE, list(CLASSES)) for index in range(count)]


def alone(item) -> np.ndarray:
    canvas = np.zeros((*SIZE, 3), np.float32)
    item.paint(canvas, np.full(3, 255, np.float32))
    return canvas[..., 0]


def test_boxes_are_tight_on_each_object_drawn_alone_on_black():
    for _, items in scenes(40):
        for item in items:
            ys, xs = np.nonzero(alone(item))
            assert item.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_the_topmost_object_is_where_its_box_says_in_the_finished_image(monkeypatch):
    # One scene drawn twice from one stream, the second time without its topmost thing: the pixels that differ are it.
    monkeypatch.setattr(shapes, "NOISE_RANGE", (0.0, 0.0))
    arrange = shapes.arrange_items
    for index in range(20):
        whole, items = draw_scene(np.random.default_rng(index), SIZE, list(CLASSES))
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "arrange_items", lambda *scene: arrange(*scene)[:-1])
            rest, _ = draw_scene(np.random.default_rng(index), SIZE, list(CLASSES))
        ys, xs = torch.nonzero((whole != rest).any(0), as_tuple=True)
        seen = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        assert max(abs(a - b) for a, b in zip(seen, items[-1].box, strict=True)) <= 1


@pytest.mark.parametrize("kind", [*CLASSES, *NEAR_MISSES])
@pytest.mark.parametrize("radius", [6.0, 21.3, 60.0])
def test_a_stencil_is_as_large_as_its_outline(kind, radius):
    outline = (CLASSES | NEAR_MISSES)[kind]
    assert np.hypot(*outline.T).max() == pytest.approx(1)
    for angle in (0.0, 0.3, 2.0):
        x = [radius * math.hypot(px, py) * math.cos(math.atan2(py, px) + angle) for px, py in outline]
        y = [radius * math.hypot(px, py) * math.sin(math.atan2(py, px) + angle) for px, py in outline]
        height, width = render_shape(kind, radius, angle).shape
        assert abs(width - (max(x) - min(x))) < 2.1
        assert abs(height - (max(y) - min(y))) < 2.1


@pytest.mark.parametrize(("kind", "filled"), [("circle", math.pi), ("square", 2.0), ("triangle", 3 * math.sqrt(3) / 4)])
def test_a_stencil_has_the_area_of_its_shape(kind, filled):
    assert render_shape(kind, 50.0, 0.4).sum() / 255 == pytest.approx(filled * 50**2, rel=0.03)
    ring = render_shape("ring", 50.0, 0.4).sum() / 255
    assert ring == pytest.approx(math.pi * 50**2 * (1 - 0.55**2), rel=0.04)


def test_every_object_stays_visible():
    overlaps = 0
    for _, items in scenes(150):
        owner = np.full(SIZE, -1)
        for number, item in enumerate(items):
            owner[alone(item) >= 128] = number
        for number, item in enumerate(items):
            ink = (alone(item) >= 128).sum()
            seen = (owner == number).sum()
            assert seen >= MIN_VISIBLE * ink
            overlaps += seen < ink
    assert overlaps > 50


def test_objects_can_be_told_from_the_ground(monkeypatch):
    gaps = []
    paint = shapes.SceneItem.paint

    def measured(item, canvas, colour):
        x1, y1, x2, y2 = item.box
        gaps.append(np.abs(colour - canvas[y1:y2, x1:x2][item.ink].mean(axis=0)).max())
        paint(item, canvas, colour)

    monkeypatch.setattr(shapes.SceneItem, "paint", measured)
    scenes(60)
    assert min(gaps) >= MIN_CONTRAST - 1e-3
    assert np.median(gaps) < 2.5 * MIN_CONTRAST


def test_records_say_what_is_drawn():
    source = Shapes(train=60, val=5, test=0)
    classes, records = source.read_split("train")
    assert tuple(classes) == tuple(CLASSES)
    sizes = []
    for record in records:
        assert record.size == (128, 128)
        assert record.boxes.dtype == np.float64
        assert record.labels.dtype == np.int64
        assert len(record.boxes) == len(record.labels) == len(record.area) == len(record.crowd) == len(record.difficult)
        assert not record.crowd.any()
        assert not record.difficult.any()
        assert (record.boxes >= 0).all()
        assert (record.boxes <= 128).all()
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        sizes += (record.boxes[:, 2:] - record.boxes[:, :2]).max(axis=1).tolist()
        image = source.load_image(record.file)
        assert image.shape == (3, 128, 128)
        assert image.dtype == torch.uint8
    labels = np.concatenate([record.labels for record in records])
    assert set(labels) == set(range(1, len(CLASSES) + 1))
    assert min(sizes) < 24
    assert max(sizes) > 80


def test_ids_and_files_are_unique():
    source = Shapes(train=10, val=10, test=10)
    records = [record for split in source.splits for record in source.read_split(split)[1]]
    assert len({record.file for record in records}) == 30
    assert all(len({record.id for record in source.read_split(split)[1]}) == 10 for split in source.splits)


def test_the_same_seed_draws_the_same_and_another_another():
    first, again, other = Shapes(train=6), Shapes(train=9), Shapes(train=6, seed=1)
    for source in (first, again, other):
        source.read_split("train")
        source.read_split("val")
    for index in range(6):
        file = f"shapes/train/{index}"
        assert torch.equal(first.load_image(file), again.load_image(file))
        assert not torch.equal(first.load_image(file), other.load_image(file))
        assert not torch.equal(first.load_image(file), first.load_image(f"shapes/val/{index}"))


def test_a_part_of_the_classes_keeps_the_labels_order():
    classes, records = Shapes(train=20, classes=["star", "circle"]).read_split("train")
    assert tuple(classes) == ("star", "circle")
    assert set(np.concatenate([record.labels for record in records])) == {1, 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["circle", "blob"]}, r"classes.*circle.*blob"),
        ({"classes": ["circle", "circle"]}, r"classes"),
        ({"classes": []}, r"classes"),
        ({"size": 16}, r"size"),
        ({"train": -1}, r"counts"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(DistillError, match=words):
        Shapes(**options)


def test_a_split_without_images_is_refused_by_name():
    source = Shapes(train=3, val=3, test=0)
    assert source.splits == ("train", "val")
    with pytest.raises(DistillError, match=r"data\.source\.test"):
        source.read_split("test")
