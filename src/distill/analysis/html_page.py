"""A page of tables, plots and pictures as one HTML file that needs no network.

Jinja2 fills the template and escapes all texts; matplotlib draws the plots. Both are well kept, and both work without
JavaScript, so a page of a run stays small: interactive plots would embed a library of 4 MB in every page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure
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
    """A plot, as an SVG that follows the colors of a dark page."""

    figure: Figure
    caption: str
    """What the plot shows, for readers who cannot see it, too."""

    @property
    def source(self) -> str:
        """The data URI."""
        file = io.BytesIO()
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Picture:
    """A picture of an image."""

    image: Image.Image
    caption: str

    @property
    def source(self) -> str:
        """The data URI."""
        image = self.image.convert("RGB")
        image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=QUALITY, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, sentences, tables, plots and pictures, in this order."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = field(default_factory=tuple)

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
