"""A picture of a training: losses and AP by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (760, 340)
"""Width and height of one diagram, in pixels."""
MARGINS = (64, 40, 16, 36)
"""Space around the plotted area of a diagram, left, top, right and bottom, in pixels."""
COLORS = ((37, 99, 235), (220, 38, 38), (22, 163, 74), (147, 51, 234), (217, 119, 6))
BACKGROUND, GRID, INK = (255, 255, 255), (228, 228, 231), (39, 39, 42)

Line = Sequence[tuple[float, float]]


def draw_curves(diagrams: Mapping[str, Mapping[str, Line]]) -> Image.Image:
    """Draw diagrams below each other.

    Args:
        diagrams: title -> name of a line -> its points, (x, y) by ascending x. Points that are not finite are left out,
            as are lines without points and diagrams without lines.
    """
    kept = {title: _finite_lines(lines) for title, lines in diagrams.items()}
    kept = {title: lines for title, lines in kept.items() if lines}
    sheet = Image.new("RGB", (SIZE[0], SIZE[1] * max(1, len(kept))), BACKGROUND)
    abscissae = [x for lines in kept.values() for line in lines.values() for x, _ in line]
    for number, (title, lines) in enumerate(kept.items()):
        _draw_diagram(ImageDraw.Draw(sheet), number * SIZE[1], title, lines, (min(abscissae), max(abscissae)))
    return sheet


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`, at equal distances of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-6 * abs(high):  # one value
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most - 1)
    first = math.floor(low / step)
    return [index * step for index in range(first, max(first + 1, math.ceil(high / step)) + 1)]


def _finite_lines(lines: Mapping[str, Line]) -> dict[str, Line]:
    finite = {name: [point for point in line if all(map(math.isfinite, point))] for name, line in lines.items()}
    return {name: line for name, line in finite.items() if line}


def _draw_diagram(
    pen: ImageDraw.ImageDraw, top: int, title: str, lines: Mapping[str, Line], x_range: tuple[float, float]
) -> None:
    font, heading = ImageFont.load_default(size=12), ImageFont.load_default(size=14)
    left, right = MARGINS[0], SIZE[0] - MARGINS[2]
    upper, lower = top + MARGINS[1], top + SIZE[1] - MARGINS[3]
    ordinates = [y for line in lines.values() for _, y in line]
    y_ticks = ticks(min(0.0, *ordinates), max(ordinates))
    x_low, x_high = x_range
    x_ticks = [x for x in ticks(x_low, x_high, 10) if x_low <= x <= x_high and x == int(x)]  # epochs are whole

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right - left), lower - up * (lower - upper)

    for y in y_ticks:
        height = place(x_low, y)[1]
        pen.line([(left, height), (right, height)], fill=GRID)
        pen.text((left - 8, height), f"{y:g}", fill=INK, font=font, anchor="rm")
    for x in x_ticks:
        pen.text((place(x, 0)[0], lower + 8), f"{x:g}", fill=INK, font=font, anchor="mt")
    pen.text((right, lower + 22), "epoch", fill=INK, font=font, anchor="rt")
    pen.text((left, top + 12), title, fill=INK, font=heading)
    key = float(right)
    for (name, line), color in reversed(list(zip(lines.items(), COLORS, strict=False))):
        pixels = [place(x, y) for x, y in line]
        if len(pixels) > 1:
            pen.line(pixels, fill=color, width=2, joint="curve")
        if len(pixels) <= 50:
            for x, y in pixels:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
        key -= pen.textlength(name, font=font) + 28
        pen.line([(key, top + 20), (key + 14, top + 20)], fill=color, width=3)
        pen.text((key + 19, top + 20), name, fill=INK, font=font, anchor="lm")
