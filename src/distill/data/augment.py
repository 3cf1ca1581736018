"""Augmentation that moves boxes: mosaic, zoom-out, IoU crop and scale jitter.

A *frame* is the plane on which images lie: one image, or the four images of a mosaic. The augmentations choose a window
of the frame, from sizes and boxes alone. Then each image is cropped and resized once, from its own pixels to its place
in the result. So no canvas is larger than the result, and pixels are interpolated only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from distill.data import rle
from distill.data.random_streams import Purpose, Streams, seed_globals
from distill.imaging.resizing import resize_image
from distill.types import DistillError, Size, Target

CUT_SIDE = 1.0
"""Least side, in pixels of the result, of a box that is cut."""


class LoadedImage(NamedTuple):
    """An image before any transform."""

    image: Tensor
    """(3, H, W) uint8, as decoded or already resized."""
    target: Target
    """Boxes in pixels of the original image, without masks."""
    original_size: Size
    """(height, width) of the original image."""
    codes: Sequence[bytes] | None = None
    """Run-length code of each box's mask, at the original size. None: without masks."""


class Tile(NamedTuple):
    """An image on the frame. Rectangles are (4,) float64 xyxy in the frame's pixels."""

    loaded: LoadedImage
    place: Tensor
    """Rectangle of the whole image."""
    visible: Tensor
    """Rectangle of the part that is visible."""


@dataclass(frozen=True)
class Augmentation:
    """Chooses and renders a part of one image or of a mosaic of four. Everything is off by default.

    The order is mosaic, zoom-out, IoU crop, scale jitter. Boxes are clipped to the visible part of their image.

    Args:
        mosaic: probability of a mosaic of four images (Bochkovskiy et al. 2020, YOLOv4), laid out as in MMDetection: a
            frame of twice the image's resized size, on which four images meet at a random point of the middle half.
            Their objects have half the usual size in the result.
        zoom_out: probability of placing the image on a larger canvas of the same shape, as SSD does (Liu et al. 2016;
            the draws are those of torchvision's `v2.RandomZoomOut`).
        zoom_out_max: largest ratio of the canvas side to the image side.
        iou_crop: probability of SSD's crop, which keeps a minimum overlap with a box (torchvision's
            `v2.RandomIoUCrop`). Boxes whose center is outside the crop are dropped. A crop of an upright image is
            upright, and one of a broad image is broad, so that batches grouped by shape need no more padding.
        scale_jitter: range [low, high] of a factor of the image's resized size; None: off. A factor below 1 makes the
            image smaller. One above 1 enlarges a random part of the image to the usual size: large scale jitter
            (Ghiasi et al. 2021) without a canvas above `data.max_size`.
        min_visible: least part of a box's area that must stay visible for a cut box to be kept, in [0, 1]. A cut box
            thinner than one pixel of the result is always dropped.
        fill: color (red, green, blue) where there is no image. The default is ImageNet's mean, which detectors
            normalize to zero, like padding.
        stop_epoch: first epoch without these augmentations and without `data.photometric`; None: they never stop.

    Raises:
        DistillError: a value is out of range.
    """

    mosaic: float = 0.0
    zoom_out: float = 0.0
    zoom_out_max: float = 4.0
    iou_crop: float = 0.0
    scale_jitter: Sequence[float] | None = None
    min_visible: float = 0.1
    fill: Sequence[int] = (124, 116, 104)
    stop_epoch: int | None = None

    def __post_init__(self) -> None:
        jitter = (1.0, 1.0) if self.scale_jitter is None else tuple(self.scale_jitter)
        rules = {
            "mosaic": ("a probability from 0 to 1", 0 <= self.mosaic <= 1),
            "zoom_out": ("a probability from 0 to 1", 0 <= self.zoom_out <= 1),
            "zoom_out_max": ("a number from 1 to 100", 1 <= self.zoom_out_max <= 100),
            "iou_crop": ("a probability from 0 to 1", 0 <= self.iou_crop <= 1),
            "scale_jitter": (
                "null or two factors from 0.01 to 100, the smaller one first",
                len(jitter) == 2 and 0.01 <= jitter[0] <= jitter[-1] <= 100,
            ),
            "min_visible": ("a part from 0 to 1", 0 <= self.min_visible <= 1),
            "fill": (
                "three integers from 0 to 255",
                len(self.fill) == 3 and all(isinstance(value, int) and 0 <= value <= 255 for value in self.fill),
            ),
            "stop_epoch": ("null or an epoch from 0", self.stop_epoch is None or self.stop_epoch >= 0),
        }
        for name, (expected, is_valid) in rules.items():
            if not is_valid:
                raise DistillError(f"data.augment.{name}: expected {expected}, got {getattr(self, name)}.")

    def covers(self, epoch: int) -> bool:
        """Whether an epoch comes before `stop_epoch`."""
        return self.stop_epoch is None or epoch < self.stop_epoch

    def is_on(self, epoch: int) -> bool:
        """Whether any of the augmentations may act in an epoch."""
        return self.covers(epoch) and bool(self.mosaic or self.zoom_out or self.iou_crop or self.scale_jitter)

    def draw_partners(self, streams: Streams, count: int) -> list[int]:
        """Draw the other three images of a mosaic, as indices below ``count``. An empty list: no mosaic."""
        rng = streams.open(Purpose.PARTNERS)
        indices: list[int] = rng.integers(count, size=3).tolist()
        return indices if rng.random() < self.mosaic else []

    def __call__(
        self, images: Sequence[LoadedImage], fit: Callable[[Size], Size], antialias: bool, streams: Streams
    ) -> tuple[Tensor, Target]:
        """Return the result (3, h, w) uint8 and its boxes, labels and masks.

        Args:
            images: one image, or the four of a mosaic.
            fit: returns the size (height, width) after the resize of an image of some size.
            antialias: whether the resize applies a low-pass filter before it reduces an image.
            streams: random numbers of the first image.
        """
        if len(images) == 1:
            height, width = images[0].image.shape[-2:]
            frame = _rectangle(0, 0, width, height)
            tiles = [Tile(images[0], frame, frame)]
        else:
            tiles, frame = lay_out_mosaic(images, fit, streams)
        boxes = [map_rectangles(tile.loaded.target.boxes, _original(tile.loaded), tile.place) for tile in tiles]
        clipped = torch.cat([clip_rectangles(part, tile.visible) for part, tile in zip(boxes, tiles, strict=True)])
        candidates = _area(clipped) > self.min_visible * _area(torch.cat(boxes))
        window, candidates = self._choose_window(frame, clipped, candidates, streams)
        window, size = self._jitter_scale(window, fit(_size(window)), streams)
        return self._render(tiles, window, size, antialias, candidates)

    def _choose_window(
        self, window: Tensor, boxes: Tensor, candidates: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """Zoom out and crop. Return the window, with integer coordinates, and the boxes that it keeps as a mask."""
        rng = streams.open(Purpose.ZOOM_OUT)
        if rng.random() < self.zoom_out:
            with seed_globals(rng):
                zoom = v2.RandomZoomOut(side_range=(1.0, self.zoom_out_max))
                left, top, right, bottom = zoom.make_params([_as_boxes(boxes, window)])["padding"]
            window = window + _rectangle(-left, -top, right, bottom)
        height, width = _size(window)
        rng = streams.open(Purpose.IOU_CROP)
        can_crop = bool(candidates.any()) and min(height, width) >= 4  # torchvision divides by the sides of a crop
        if can_crop and rng.random() < self.iou_crop:
            ratios = (0.5, 1.0) if height > width else (1.0, 2.0)
            with seed_globals(rng):
                crop = v2.RandomIoUCrop(min_aspect_ratio=ratios[0], max_aspect_ratio=ratios[1])
                chosen = crop.make_params([_as_boxes(boxes[candidates], window)])
            if chosen:  # empty: torchvision chose to leave the image as it is
                left, top = chosen["left"], chosen["top"]
                corners = _rectangle(left, top, left + chosen["width"], top + chosen["height"])
                window = window[:2].repeat(2) + corners
                candidates = candidates.clone()
                candidates[candidates.clone()] = chosen["is_within_crop_area"]
        return window, candidates

    def _jitter_scale(self, window: Tensor, size: Size, streams: Streams) -> tuple[Tensor, Size]:
        """Return the part of a window to draw, and the size (height, width) to draw it at."""
        if self.scale_jitter is None:
            return window, size
        low, high = self.scale_jitter
        rng = streams.open(Purpose.SCALE_JITTER)
        factor, position = rng.uniform(low, high), torch.from_numpy(rng.random(2))
        sides = (window[2:] - window[:2]) / max(1.0, factor)
        corner = window[:2] + position * (window[2:] - window[:2] - sides)
        height, width = (max(1, int(side * min(1.0, factor))) for side in size)
        return torch.cat([corner, corner + sides]), (height, width)

    def _render(
        self, tiles: Sequence[Tile], window: Tensor, size: Size, antialias: bool, candidates: Tensor
    ) -> tuple[Tensor, Target]:
        """Draw a window of the frame at a size (height, width), with the boxes of the mask ``candidates``."""
        image = torch.tensor(self.fill, dtype=torch.uint8).expand(*size, 3).contiguous().permute(2, 0, 1)
        result = _rectangle(0, 0, size[1], size[0])
        parts: list[Target] = []
        counts = [len(tile.loaded.target.boxes) for tile in tiles]
        for tile, wanted in zip(tiles, torch.split(candidates, counts), strict=True):
            pixels, original = _pixels(tile.loaded), _original(tile.loaded)
            whole = map_rectangles(tile.place, window, result)
            place = clip_rectangles(map_rectangles(tile.visible, window, result), result).round()
            if _area(place) == 0:
                continue
            # Whole pixels of the image. Boxes and masks follow the pixels that are drawn, so rounding moves all alike.
            source = clip_rectangles(map_rectangles(place, whole, pixels).round(), pixels)
            source[:2] = torch.minimum(source[:2], pixels[2:] - 1)
            source[2:] = torch.maximum(source[2:], source[:2] + 1)
            image[_slices(place)] = resize_image(tile.loaded.image[_slices(source)], _size(place), antialias)
            boxes = map_rectangles(tile.loaded.target.boxes, map_rectangles(source, pixels, original), place)
            clipped = clip_rectangles(boxes, place)
            sides = (clipped[:, 2:] - clipped[:, :2]).amin(dim=1)
            is_cut = (clipped - boxes).abs().amax(dim=1) > 1e-6
            enough = (_area(clipped) >= self.min_visible * _area(boxes)) & (sides >= CUT_SIDE)
            keep = wanted & (enough | ~is_cut)
            masks = None
            if tile.loaded.codes is not None:
                codes = [tile.loaded.codes[index] for index in keep.nonzero().flatten().tolist()]
                masks = _draw_masks(codes, tile.loaded, source, place, size)
                visible = (
                    masks.bool().flatten(1).any(dim=1) | ~is_cut[keep]
                )  # a cut may leave a box and nothing of its mask
                masks, keep[keep.clone()] = masks[visible], visible
            parts.append(Target(clipped[keep].float(), tile.loaded.target.labels[keep], masks))
        return image, _join(parts, tiles[0].loaded, size)


NO_AUGMENTATION = Augmentation()
"""All augmentations are off."""


def lay_out_mosaic(
    images: Sequence[LoadedImage], fit: Callable[[Size], Size], streams: Streams
) -> tuple[list[Tile], Tensor]:
    """Place four images at their resized sizes around a random point. Return them and the frame's rectangle.

    The first image decides the shape of the frame, so a mosaic is broad if its first image is broad.
    """
    height, width = fit(images[0].original_size)
    frame = _rectangle(0, 0, 2 * width, 2 * height)
    x, y = (torch.from_numpy(streams.open(Purpose.LAYOUT).uniform(0.25, 0.75, 2)) * frame[2:]).round().tolist()
    tiles = []
    for index, loaded in enumerate(images):
        below, right = divmod(index, 2)
        tile_height, tile_width = fit(loaded.original_size)
        left, top = x - (not right) * tile_width, y - (not below) * tile_height
        place = _rectangle(left, top, left + tile_width, top + tile_height)
        tiles.append(Tile(loaded, place, clip_rectangles(place, frame)))
    return tiles, frame


def map_rectangles(rectangles: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Apply the map that takes the rectangle ``old`` to ``new`` to rectangles (..., 4), and return them as float64."""
    scale = (new[2:] - new[:2]) / (old[2:] - old[:2])
    return (rectangles - old[:2].repeat(2)) * scale.repeat(2) + new[:2].repeat(2)


def clip_rectangles(rectangles: Tensor, window: Tensor) -> Tensor:
    """Clip rectangles (..., 4) to a window (4,). A rectangle outside gets an area of zero."""
    return torch.minimum(torch.maximum(rectangles, window[:2].repeat(2)), window[2:].repeat(2))


def _rectangle(left: float, top: float, right: float, bottom: float) -> Tensor:
    return torch.tensor([left, top, right, bottom], dtype=torch.float64)


def _pixels(loaded: LoadedImage) -> Tensor:
    height, width = loaded.image.shape[-2:]
    return _rectangle(0, 0, width, height)


def _original(loaded: LoadedImage) -> Tensor:
    height, width = loaded.original_size
    return _rectangle(0, 0, width, height)


def _size(rectangle: Tensor) -> Size:
    left, top, right, bottom = rectangle.tolist()
    return int(bottom - top), int(right - left)


def _slices(rectangle: Tensor) -> tuple[slice, slice, slice]:
    left, top, right, bottom = rectangle.int().tolist()
    return slice(None), slice(top, bottom), slice(left, right)


def _area(rectangles: Tensor) -> Tensor:
    return (rectangles[..., 2] - rectangles[..., 0]) * (rectangles[..., 3] - rectangles[..., 1])


def _as_boxes(boxes: Tensor, window: Tensor) -> tv_tensors.BoundingBoxes:
    """Boxes in pixels of a window, as torchvision's transforms expect them."""
    return tv_tensors.BoundingBoxes(boxes - window[:2].repeat(2), format="XYXY", canvas_size=_size(window))


def _draw_masks(codes: Sequence[bytes], loaded: LoadedImage, source: Tensor, place: Tensor, size: Size) -> Tensor:
    """Return masks (N, h, w) uint8 of the result. They are decoded one by one, because they have the original size."""
    masks = torch.zeros(len(codes), *size, dtype=torch.uint8)
    height, width = loaded.image.shape[-2:]
    for mask, code in zip(masks, codes, strict=True):
        whole = rle.resize_mask(rle.decode_mask(code, loaded.original_size), (height, width))
        mask[_slices(place)[1:]] = rle.resize_mask(whole[_slices(source)[1:]], _size(place))
    return masks


def _join(parts: Sequence[Target], first: LoadedImage, size: Size) -> Target:
    masks = [torch.zeros(0, *size, dtype=torch.uint8), *(part.masks for part in parts if part.masks is not None)]
    return Target(
        torch.cat([torch.zeros(0, 4), *(part.boxes for part in parts)]),
        torch.cat([first.target.labels[:0], *(part.labels for part in parts)]),
        None if first.codes is None else torch.cat(masks),
    )
