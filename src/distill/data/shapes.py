"""Drawn shapes: a small synthetic detection data set on which large detectors measurably outperform small ones.

Every image contains four to ten objects on a textured background. The clutter consists of lines, speckles, pixel noise
and near misses of each class that must not be detected: a hexagon for the circle, a rectangle for the square, an open
ring for the ring. Object sizes range from a tenth of the image to most of it. Colors are independent of the class. The
contrast varies, and objects overlap.

Boxes and masks are amodal: they include the pixels that later objects cover. A box is tight around these pixels, and a
mask consists of them. At least the part `MIN_VISIBLE` of each object's pixels is visible. Nothing is downloaded. An
image depends on (seed, split, index) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from distill.data import rle
from distill.data.records import Record, make_record
from distill.types import DistillError

MIN_VISIBLE = 0.5
"""Smallest visible part of an object's pixels, between 0 and 1. Objects drawn later cover at most the rest."""
MIN_CONTRAST = 50
"""Smallest difference between an object and the background under it, in at least one channel of 0-255."""
MAX_TURN = 0.35
"""Largest rotation of a shape in either direction, in radians."""
NOISE_RANGE = (2.0, 10.0)
"""Range of the standard deviation of an image's pixel noise, in gray levels."""
SPLITS = ("train", "val", "test")
UNLABELED = "unlabeled"
"""Name that stands for the split in the files of images without labels."""
_SUPERSAMPLING = 4  # shapes are drawn this much larger, then averaged, which smooths the edges
_MAX_TRIES = 20


def _polar_points(turns: NDArray[np.float64], radius: float | NDArray[np.float64] = 1.0) -> NDArray[np.float64]:
    directions = np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1)
    points: NDArray[np.float64] = directions * np.reshape(radius, (-1, 1))
    return points


def _regular_polygon(corners: int, start: float = -0.25) -> NDArray[np.float64]:
    return _polar_points(start + np.arange(corners) / corners)


def _star(spikes: int, inner: float) -> NDArray[np.float64]:
    return _polar_points(-0.25 + np.arange(2 * spikes) / (2 * spikes), np.tile([1.0, inner], spikes))


def _ring(part: float, inner: float) -> NDArray[np.float64]:
    turns = np.linspace(0, part, 48)
    return np.concatenate([_polar_points(turns), _polar_points(turns[::-1], inner)])


def _polygon(*points: tuple[float, float]) -> NDArray[np.float64]:
    return np.array(points) / max(math.hypot(*point) for point in points)


_BAR_HALF_WIDTH = 0.34  # half the width of the bars of a cross, for a bar of length 2
CLASSES: dict[str, NDArray[np.float64]] = {
    "circle": _regular_polygon(48),
    "square": _regular_polygon(4, 0.125),
    "triangle": _regular_polygon(3),
    "star": _star(5, 0.42),
    "ring": _ring(1.0, 0.55),
    "cross": _polygon(
        *[
            (1, -_BAR_HALF_WIDTH),
            (1, _BAR_HALF_WIDTH),
            (_BAR_HALF_WIDTH, _BAR_HALF_WIDTH),
            (_BAR_HALF_WIDTH, 1),
            (-_BAR_HALF_WIDTH, 1),
            (-_BAR_HALF_WIDTH, _BAR_HALF_WIDTH),
        ],
        *[
            (-1, _BAR_HALF_WIDTH),
            (-1, -_BAR_HALF_WIDTH),
            (-_BAR_HALF_WIDTH, -_BAR_HALF_WIDTH),
            (-_BAR_HALF_WIDTH, -1),
            (_BAR_HALF_WIDTH, -1),
            (_BAR_HALF_WIDTH, -_BAR_HALF_WIDTH),
        ],
    ),
}
"""Class name to outline: V vertices (V, 2) in the unit circle."""
NEAR_MISSES: dict[str, NDArray[np.float64]] = {
    "hexagon": _regular_polygon(6),
    "rectangle": _polygon((1, 0.5), (-1, 0.5), (-1, -0.5), (1, -0.5)),
    "kite": _polygon((0, -1), (0.6, 0.35), (0, -0.05), (-0.6, 0.35)),
    "four-star": _star(4, 0.42),
    "open ring": _ring(0.78, 0.55),
    "tee": _polygon(
        (-1, -1),
        (1, -1),
        (1, -0.3),
        (_BAR_HALF_WIDTH, -0.3),
        (_BAR_HALF_WIDTH, 1),
        (-_BAR_HALF_WIDTH, 1),
        (-_BAR_HALF_WIDTH, -0.3),
        (-1, -0.3),
    ),
}
"""Outlines (V, 2) that resemble a class but belong to the background."""
_OUTLINES = CLASSES | NEAR_MISSES


@dataclass(frozen=True)
class SceneItem:
    """One drawn shape: its kind, its coverage and the pixel coordinates of its upper left corner.

    The coverage `alpha` (h, w) is uint8, from 0 to 255. It has no empty rows or columns at its borders.
    """

    kind: str
    alpha: NDArray[np.uint8]
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tight xyxy box in pixels; right and bottom edges are exclusive."""
        height, width = self.alpha.shape
        return self.x, self.y, self.x + width, self.y + height

    @property
    def ink(self) -> NDArray[np.bool_]:
        """Mask (h, w) of the pixels that the shape covers by half or more."""
        return self.alpha >= 128

    def paint(self, canvas: NDArray[np.float32], color: NDArray[np.float32]) -> None:
        """Paint the shape over a canvas (H, W, 3), in place."""
        x1, y1, x2, y2 = self.box
        patch, weight = canvas[y1:y2, x1:x2], self.alpha[..., None].astype(np.float32) / 255
        patch += weight * (color - patch)


def render_shape(kind: str, radius: float, angle: float) -> NDArray[np.uint8]:
    """Render the coverage (h, w), uint8, of a shape.

    The shape is inscribed in a circle with this radius in pixels and rotated by `angle` radians.
    """
    side = 2 * math.ceil(radius) + 2
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = (_OUTLINES[kind] @ turn * radius + side / 2) * _SUPERSAMPLING
    fine = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    ImageDraw.Draw(fine).polygon([tuple(point) for point in points], fill=255)
    alpha = np.array(fine.reduce(_SUPERSAMPLING))
    alpha[alpha < 64] = 0  # barely covered pixels are invisible and must not widen the box
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def arrange_items(rng: np.random.Generator, size: tuple[int, int], classes: list[str]) -> list[SceneItem]:
    """Choose the shapes of one scene of this (height, width), from back to front.

    The scene has shapes of these classes and near misses. Every shape stays visible: at least the part `MIN_VISIBLE` of
    its pixels is uncovered. A shape is left out if `_MAX_TRIES` random placements would violate this.
    """
    wanted = [*rng.choice(classes, rng.integers(4, 11)), *rng.choice(list(NEAR_MISSES), rng.integers(1, 4))]
    owner = np.full(size, -1)  # the topmost item of each pixel
    items: list[SceneItem] = []
    areas = visible = np.zeros(0)
    for kind in rng.permutation(wanted):
        for _ in range(_MAX_TRIES):
            item = _random_item(rng, str(kind), size)
            x1, y1, x2, y2 = item.box
            ink, under = item.ink, owner[y1:y2, x1:x2]
            left = visible - np.bincount(under[ink] + 1, minlength=len(items) + 1)[1:]
            if (left >= MIN_VISIBLE * areas).all():
                under[ink] = len(items)
                areas, visible = np.append(areas, ink.sum()), np.append(left, ink.sum())
                items.append(item)
                break
    return items


def _random_item(rng: np.random.Generator, kind: str, size: tuple[int, int]) -> SceneItem:
    """Draw a shape of random size, rotation and position inside the image. The logarithm of its radius is uniform."""
    radius = 0.5 * min(size) * math.exp(rng.uniform(math.log(0.12), math.log(0.8)))
    alpha = render_shape(kind, radius, rng.uniform(-MAX_TURN, MAX_TURN))
    y, x = (int(rng.integers(0, side - extent + 1)) for side, extent in zip(size, alpha.shape, strict=True))
    return SceneItem(kind, alpha, x, y)


def draw_background(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """Draw a textured canvas (H, W, 3), float32 of 0-255, with lines and speckles."""
    height, width = size
    base, spread = rng.uniform(30, 225, 3), rng.uniform(5, 30)
    coarse = (base + rng.normal(0, spread, (5, 5, 3))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        ends = rng.uniform(0, [width, height, width, height]).tolist()
        draw.line(ends, fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 4)))
    for x, y, radius in rng.uniform([0, 0, 0.5], [width, height, 2.5], (rng.integers(0, 12), 3)):
        dot = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(dot, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.array(image, dtype=np.float32)


def draw_scene(rng: np.random.Generator, size: tuple[int, int], classes: list[str]) -> tuple[Tensor, list[SceneItem]]:
    """Draw one image (3, H, W), uint8, and return it with its shapes, from back to front.

    Shapes whose kind is not in `classes` are background: the near misses.
    """
    items = arrange_items(rng, size, classes)
    canvas = draw_background(rng, size)
    for item in items:
        x1, y1, x2, y2 = item.box
        under = canvas[y1:y2, x1:x2][item.ink].mean(axis=0)
        item.paint(canvas, _contrasting_color(rng, under))
    canvas += rng.uniform(*NOISE_RANGE) * rng.standard_normal(canvas.shape, dtype=np.float32)
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), items


def _contrasting_color(rng: np.random.Generator, under: NDArray[np.float32]) -> NDArray[np.float32]:
    """Choose a color that contrasts with the background color under the shape. The contrast is uniform."""
    channel, contrast = rng.integers(3), rng.uniform(MIN_CONTRAST, 180)
    color = np.clip(under + rng.uniform(-contrast, contrast, 3), 0, 255)
    # The shift goes away from the nearer end of 0-255, so a contrast of up to half the range always fits.
    sign = 1 if under[channel] < 128 else -1
    color[channel] = under[channel] + sign * min(contrast, 127)
    return color.astype(np.float32)


class Shapes:
    """The source `data=shapes` draws its images.

    Args:
        train: number of training images.
        val: number of validation images.
        test: number of test images; 0 for none.
        size: side of the square images in pixels, at least 64.
        classes: some of circle, square, triangle, star, ring and cross, in the order of their labels; None takes all.
        seed: seed of the drawing. It is independent of the run's seed: runs with different seeds use the same images.

    Raises:
        DistillError: `classes` is empty or has unknown or repeated names, `size` is below 64, or a count is negative.
    """

    masks = True

    def __init__(
        self,
        train: int = 400,
        val: int = 100,
        test: int = 200,
        size: int = 128,
        classes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.classes = tuple(CLASSES if classes is None else classes)
        self.counts = dict(zip(SPLITS, (train, val, test), strict=True))
        self.size, self.seed = size, seed
        self._drawn: dict[str, tuple[list[Record], Tensor]] = {}
        self._unlabeled = torch.empty(0)
        if not self.classes or not set(self.classes) <= set(CLASSES) or len(set(self.classes)) < len(self.classes):
            raise DistillError(f"data.source.classes: expected different names of {list(CLASSES)}, got {classes}.")
        if size < 64 or min(self.counts.values()) < 0:
            raise DistillError(f"data.source: expected size >= 64 and counts >= 0, got size {size}, {self.counts}.")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have images."""
        return tuple(split for split, count in self.counts.items() if count)

    def read_split(self, split: str) -> tuple[tuple[str, ...], list[Record]]:
        """Return the class names and records of a split.

        The first call draws the images of the split and keeps them in memory as uint8.

        Raises:
            DistillError: the split has no images.
        """
        if split not in self.splits:
            raise DistillError(f"data=shapes has no {split} images. Set data.source.{split} to how many to draw.")
        if split not in self._drawn:
            self._drawn[split] = self._draw(split, range(self.counts[split]))
        return self.classes, self._drawn[split][0]

    def load_image(self, file: str) -> Tensor:
        """Return the image (3, H, W), uint8, of a record's `file`, such as `shapes/train/12`. Read its split first."""
        _, split, index = file.split("/")
        if split == UNLABELED:
            return self._unlabeled[int(index) - self.counts["train"]]
        return self._drawn[split][1][int(index)]

    def draw_unlabeled(self, count: int) -> list[Record]:
        """Return records without boxes of further images: those that a larger `train` would add to the training images.

        The images are kept in memory as uint8.

        Args:
            count: number of images.
        """
        first = self.counts["train"]
        records, self._unlabeled = self._draw("train", range(first, first + count))
        return [make_record(each.id, f"shapes/{UNLABELED}/{each.id}", each.size) for each in records]

    def _draw(self, split: str, indices: range) -> tuple[list[Record], Tensor]:
        side = (self.size, self.size)
        images = torch.empty(len(indices), 3, *side, dtype=torch.uint8)
        records = []
        for place, index in enumerate(indices):
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(split), index)))
            images[place], items = draw_scene(rng, side, list(self.classes))
            records.append(self._record(f"shapes/{split}/{index}", index, items))
        return records, images

    def _record(self, file: str, index: int, items: list[SceneItem]) -> Record:
        side = (self.size, self.size)
        objects = [item for item in items if item.kind in self.classes]
        boxes = np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4)
        return Record(
            id=index,
            file=file,
            size=side,
            boxes=boxes,
            labels=np.array([self.classes.index(item.kind) + 1 for item in objects], dtype=np.int64),
            crowd=np.zeros(len(objects), dtype=bool),
            difficult=np.zeros(len(objects), dtype=bool),
            area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
            segmentation=[rle.to_coco(rle.encode_masks(self._mask(item)[None])[0], side) for item in objects],
        )

    def _mask(self, item: SceneItem) -> Tensor:
        """Return the mask (H, W), uint8, of all pixels that an item touches. The item's box is tight around them."""
        mask = torch.zeros(self.size, self.size, dtype=torch.uint8)
        x1, y1, x2, y2 = item.box
        mask[y1:y2, x1:x2] = torch.from_numpy(item.alpha > 0)
        return mask
