"""A page of tables, plots and pictures as one HTML file that needs no network.

Jinja2 fills the template and escapes all texts; the plots are those of matplotlib. Both are well kept, and need no
JavaScript, so a page stays small: interactive plots would embed a library of 4 MB in every page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

PICTURE_WIDTH = 1200
"""Largest width of a picture in pixels."""
QUALITY = 82
"""JPEG quality of pictures."""


@dataclass(frozen=True)
class Table:
    """A table: texts by row. The first column has names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot in a PNG file. A dark page inverts its brightness."""

    file: Path
    caption: str
    """What the plot shows, for readers who cannot see it, too."""

    @property
    def source(self) -> str:
        """The data URI."""
        return "data:image/png;base64," + base64.b64encode(self.file.read_bytes()).decode()


@dataclass(frozen=True)
class Picture:
    """An image file, which is reduced to a width that fits a page."""

    file: Path
    caption: str

    @property
    def source(self) -> str:
        """The data URI."""
        with Image.open(self.file) as opened:
            image = opened.convert("RGB")
        image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, sentences, tables, plots and pictures, in this order."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = ()

    @property
    def anchor(self) -> str:
        """The part of a link that leads to the section."""
        return "-".join("".join(letter if letter.isalnum() else " " for letter in self.title.lower()).split())


def render_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a page as HTML.

    Args:
        title: heading of the page.
        lead: the sentence below the heading.
        sections: the parts of the page; empty ones are left out.
    """
    environment = Environment(
        loader=PackageLoader("distill.analysis"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kept = [part for part in sections if part.texts or part.tables or part.plots or part.pictures]
    return environment.get_template("page.html").render(title=title, lead=lead, sections=kept)
