"""Reading of one XML file in Pascal VOC's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from re import search
from typing import Any
from unicodedata import normalize

from defusedxml.ElementTree import ParseError, fromstring

from distill.data.file_index import path_ends, spellings
from distill.types import Size

KNOWN_TAGS = frozenset({"annotation", "filename", "size", "object"})
"""Tags of which at least one occurs in every VOC file, in lower case."""
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MISSING_XML = "no such file; write it, or take the name from the list"


@dataclass(frozen=True)
class XmlAnnotation:
    """The content of one XML file."""

    xml: Path
    image: Path | None
    size: Size | None = None
    things: Sequence[tuple[str, Sequence[float], bool]] = ()
    """Name, corners and `difficult` flag of each object. The corners are unchanged, or empty if one is not a number."""
    fault: str | None = None
    """Why the image and its annotations cannot be used; None if they can."""


def parse_xml(xml: Path, images: Sequence[Path]) -> XmlAnnotation:
    """Read an XML file. ``images`` are the images of its name; its `<filename>` decides among several."""
    try:
        content = xml.read_bytes()
    except FileNotFoundError:
        return XmlAnnotation(xml, None, fault=MISSING_XML)
    except OSError as error:
        return XmlAnnotation(xml, None, fault=f"cannot be read ({error})")
    try:
        tree = _parse_content(content)
    except (ParseError, ValueError, LookupError) as error:
        reason = f"cannot be read as XML ({error}; encoding {_declared_encoding(content)}); write it again"
        return XmlAnnotation(xml, images[0] if images else None, fault=reason)
    for node in tree.iter():
        node.tag = node.tag.rpartition("}")[2].lower()
    image, fault = _choose_image(images, _find_text(tree, "filename"))
    tags = {node.tag for node in tree.iter() if node is not tree or not len(tree)}
    if not tags & KNOWN_TAGS:
        fault = (
            f"no known tag occurs in it: expected object, size or filename, got {', '.join(sorted(tags)[:5])}; export "
            "it as Pascal VOC"
        )
    things = [
        (_find_text(thing, "name"), _parse_corners(thing), _find_text(thing, "difficult").lower() in ("1", "true"))
        for thing in tree.iter("object")
    ]
    return XmlAnnotation(xml, image, _parse_size(tree), things, fault)


def _parse_content(content: bytes) -> Any:
    """Parse an XML file. Python decodes the encodings that the parser does not know, such as GBK and Shift JIS."""
    try:
        return fromstring(content)
    except (ParseError, ValueError):
        encoding = _declared_encoding(content)
        if encoding.lower() in ("utf-8", "utf8"):
            raise
        return fromstring(content.decode(encoding))


def _declared_encoding(content: bytes) -> str:
    declaration = search(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)""", content[:200])
    return declaration[1].decode() if declaration else "utf-8"


def _choose_image(images: Sequence[Path], filename: str) -> tuple[Path | None, str | None]:
    """Return the image of an XML file and None, or None and the fault. The XML's `<filename>` decides among several."""
    wanted = {path_ends(spelling)[-1].casefold() for spelling in spellings(filename)}
    named = [image for image in images if normalize("NFC", image.name).casefold() in wanted]
    if len(images) == 1 or len(named) == 1:
        return (images if len(images) == 1 else named)[0], None
    if not images:
        return None, "has no image of this name; add it, or take the name from the list"
    others = ", ".join(str(image) for image in images)
    return None, f"several images have this name: {others}; name one of them in <filename>, or rename the others"


def _parse_corners(thing: Any) -> tuple[float, ...]:
    try:
        return tuple(float(_find_text(thing, f"bndbox/{corner}")) for corner in CORNERS)
    except ValueError:
        return ()


def _parse_size(tree: Any) -> Size | None:
    try:
        height, width = (int(float(_find_text(tree, f"size/{side}"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if height and width else None


def _find_text(node: Any, path: str) -> str:
    return (node.findtext(path) or "").strip()
