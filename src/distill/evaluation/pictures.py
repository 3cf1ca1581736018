"""Pictures that compare ground truth, teacher and student side by side."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.files import atomic_write
from distill.types import Detections, DistillError, Target

_SIDE_RANGE = (480, 800)
"""Smallest and largest longer side of a drawn image, in pixels. Smaller images are enlarged, larger ones reduced."""
_GAP, _CAPTION_HEIGHT = 6, 26
_MASK_OPACITY = 110
"""Opacity of a mask's color over the image, from 0 to 255."""
_BACKGROUND, _FOREGROUND = (24, 24, 27), (244, 244, 245)

Color = tuple[int, int, int]
_Box = tuple[float, float, float, float]


class _Mark(NamedTuple):
    """One box to draw, in pixels of the picture, and its mask (H, W), in pixels of the image, or None."""

    box: _Box
    text: str
    color: Color
    mask: Tensor | None


def panel(
    image: Tensor, columns: Mapping[str, Detections | Target], classes: Sequence[str], min_score: float = 0.5
) -> Image.Image:
    """Draw the image once per column, with boxes, masks (if any), class names and scores, under a caption.

    Args:
        image: (3, H, W) uint8 RGB.
        columns: caption to detections or targets. Boxes are in pixels **of this image**, masks have its size, and
            labels are from 1 to K. Detections also have scores.
        classes: names of the K classes. Each class has a color, the same in every column.
        min_score: detections with a lower score are left out.

    Raises:
        DistillError: `image` is not (3, H, W) uint8, or there is no column.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or not columns:
        raise DistillError(
            f"Expected a uint8 image (3, H, W) and at least one column to draw, got {image.dtype} "
            f"{tuple(image.shape)} and {len(columns)} columns. Draw Batch.images before normalization."
        )
    height, width = image.shape[1:]
    scale = min(max(1.0, _SIDE_RANGE[0] / max(height, width)), _SIDE_RANGE[1] / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    plain = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize(size, Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", ((size[0] + _GAP) * len(columns) + _GAP, size[1] + _CAPTION_HEIGHT + _GAP), _BACKGROUND)
    for index, (caption, things) in enumerate(columns.items()):
        left = _GAP + index * (size[0] + _GAP)
        marks = _make_marks(things, classes, min_score, (width, height), size)
        sheet.paste(_draw_marks(plain, marks), (left, _CAPTION_HEIGHT))
        _draw_caption(sheet, f"{caption}  ({len(marks)})", left, size[0])
    return sheet


def save_panel(path: str | os.PathLike[str], picture: Image.Image) -> Path:
    """Write a picture to a file, completely or not at all. The suffix of `path` determines the format.

    Missing folders are created.

    Raises:
        DistillError: the suffix is not that of a picture format.
    """
    path = Path(path)
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise DistillError(f"Expected a picture file such as name.png or name.jpg, got '{path}'.")
    return atomic_write(path, lambda file: picture.save(file, format=formats[path.suffix.lower()]))


def label_color(label: int) -> Color:
    """Return a bright color for a label.

    Hues of successive labels differ by the golden ratio of the color circle, so their colors are easy to distinguish.
    """
    hue, value = (label * 0.618034) % 1.0, (1.0, 0.8)[label // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _make_marks(
    things: Detections | Target,
    classes: Sequence[str],
    min_score: float,
    source: tuple[int, int],
    drawn: tuple[int, int],
) -> list[_Mark]:
    """Make the marks of a column, by ascending score, so that the box with the best score is drawn on top.

    Boxes that are not finite are left out. Corners outside the picture are moved to its edge. `source` and `drawn` are
    (width, height) of the image and of the drawn image.
    """
    scored = isinstance(things, Detections)
    scores = things.scores.detach().float().cpu() if isinstance(things, Detections) else torch.ones(len(things.labels))
    boxes = things.boxes.detach().float().cpu() * (torch.tensor(drawn * 2) / torch.tensor(source * 2))
    keep = boxes.isfinite().all(1) & ((scores >= min_score) | (not scored))
    boxes = boxes.clamp(torch.zeros(4), torch.tensor(drawn * 2) - 1.0)
    order = scores.argsort(stable=True)
    marks = []
    for index in order[keep[order]].tolist():
        label = int(things.labels[index])
        name = classes[label - 1] if 1 <= label <= len(classes) else f"class {label}"
        x1, y1, x2, y2 = boxes[index].tolist()
        box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        mask = None if things.masks is None else things.masks[index].detach().cpu()
        marks.append(_Mark(box, f"{name} {scores[index]:.2f}" if scored else name, label_color(label), mask))
    return marks


def _draw_marks(plain: Image.Image, marks: Sequence[_Mark]) -> Image.Image:
    picture = plain.copy()
    for mark in marks:
        if mark.mask is not None:
            veil = Image.fromarray(mark.mask.to(torch.uint8).numpy() * _MASK_OPACITY).resize(picture.size)
            picture.paste(mark.color, mask=veil)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for mark in marks:
        pen.rectangle(mark.box, outline=mark.color, width=2)
    taken: list[_Box] = []
    for mark in reversed(marks):
        left, top, right, bottom = pen.textbbox((0, 0), mark.text, font=font)
        place = _find_label_place(mark.box, (right - left + 5, bottom - top + 5), picture.size, taken)
        if place is not None:
            taken.append(place)
            pen.rectangle(place, fill=mark.color)
            pen.text((place[0] + 3 - left, place[1] + 3 - top), mark.text, fill=_text_color(mark.color), font=font)
    return picture


def _find_label_place(
    box: _Box, size: tuple[float, float], picture: tuple[int, int], taken: Sequence[_Box]
) -> _Box | None:
    """Find a free place for a label above, below or inside its box. Return None if all of them overlap other labels."""
    x = max(0.0, min(box[0], picture[0] - 1 - size[0]))
    for y in (box[1] - size[1], box[3] + 1, box[1], box[3] - size[1]):
        place = (x, y, x + size[0], y + size[1])
        inside = y >= 0 and place[3] < picture[1]
        if inside and all(place[0] > o[2] or o[0] > place[2] or place[1] > o[3] or o[1] > place[3] for o in taken):
            return place
    return None


def _draw_caption(sheet: Image.Image, text: str, left: int, width: int) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    pen.text((left + width / 2, _CAPTION_HEIGHT / 2), text, fill=_FOREGROUND, font=font, anchor="mm")


def _text_color(background: Color) -> Color:
    """Return black for a bright background and white for a dark one, by its luma (ITU-R BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
