"""How much a configuration may grow. A few lines can stand for more than any memory holds: a YAML alias of aliases, an
interpolation of interpolations, a list in a list in a list. All of these are counted, before or while they grow.

OmegaConf has no option for it, so the bounds stand around its two doors: the loader of its YAML, and the resolving of one
interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import omegaconf._utils as omegaconf_yaml
import yaml
from omegaconf.base import Container
from omegaconf.errors import InterpolationResolutionError
from yaml import events

from distill.types import DistillError

TEXT = 2**20
"""Characters of one YAML text: twenty times more than a configuration of all that there is."""
SCALAR = 2**17
"""Characters of one value, of as many as one word of a command line may have; made by interpolations or written."""
PATTERN = 2**12
"""Characters of a value with interpolations in it, each of which may become a `SCALAR`; and of a number."""
DEPTH = 64
"""Mappings and lists within one another."""
ENTRIES = 20_000
"""Entries that a YAML text stands for, its aliases written out, and those that interpolations bring to one configuration."""
STEP = 50
"""Entries that an interpolation counts for beside: it takes as long as so many."""


# -- YAML


def whole(stream: Any, where: str = "") -> str:
    """The text of a YAML file, or of a string, that stands for no more than it seems to.

    Args:
        stream: what to read, or the text itself.
        where: names it in messages; otherwise the stream's own name does.

    Raises:
        DistillError: it is too long, too deep, or its aliases make too much of it.
    """
    where = where or str(getattr(stream, "name", "a text in the configuration"))
    text = stream if isinstance(stream, str) else stream.read(TEXT + 1)
    if isinstance(text, bytes):
        text = text.decode()
    if len(text) > TEXT:
        raise _refusal(where, f"more than {TEXT} characters")
    _count(text, where)
    return text


def _count(text: str, where: str) -> None:
    """Walks through the parser's events, which are not nested and so cost neither stack nor memory."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and entries before it
    total = 0
    loader = yaml.SafeLoader(text)
    loader.name = where
    while loader.check_event():
        event = loader.get_event()
        if isinstance(event, events.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes |= {anchor: total - before} if anchor else {}
        elif isinstance(event, events.NodeEvent):
            # An alias inside of what it names would have no end; it is the loader's to refuse.
            total += sizes.get(event.anchor, 1) if isinstance(event, events.AliasEvent) else 1
            if isinstance(event, events.ScalarEvent) and len(event.value) > _most(event.value):
                raise _refusal(where, f"a value of {len(event.value)} characters")
            if isinstance(event, events.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
        if total > ENTRIES:
            raise _refusal(where, f"its aliases written out, more than {ENTRIES} entries")
        if len(open_nodes) > DEPTH:
            raise _refusal(where, f"lists or mappings more than {DEPTH} deep")


def _most(value: str) -> int:
    return PATTERN if "${" in value or value.startswith(tuple("+-.0123456789")) else SCALAR


def _refusal(where: str, what: str) -> DistillError:
    return DistillError(f"{where}: {what}, which no configuration needs. If you did not write it, do not use it")


# -- interpolations

_spent: int | None = None


@contextmanager
def counted() -> Iterator[None]:
    """Within, all that interpolations bring is counted together; elsewhere what each one brings, those in it included."""
    global _spent
    outermost = _spent is None
    _spent = 0 if outermost else _spent
    try:
        yield
    finally:
        _spent = None if outermost else _spent


def _spend(found: Any) -> None:
    """Count what an interpolation gave: entries of a node, and a text by its length."""
    global _spent
    if isinstance(found, str) and len(found) > SCALAR:
        raise InterpolationResolutionError(f"interpolations make a text of more than {SCALAR} characters")
    _spent = (_spent or 0) + STEP + (_entries(found) if isinstance(found, Container) else len(str(found)) // 64)
    if _spent > ENTRIES:
        raise InterpolationResolutionError(f"interpolations bring more than {ENTRIES} entries")


def _entries(node: Any) -> int:
    content = node._content if isinstance(node, Container) else None
    below = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return 1 + sum(map(_entries, below))


def install() -> None:
    """Set the bounds, once for the whole process."""
    resolve = Container.resolve_parse_tree
    if getattr(resolve, "bounded", False):
        return

    def bounded(self: Container, *args: Any, **named: Any) -> Any:
        with counted():
            found = resolve(self, *args, **named)
            _spend(found)
            return found

    bounded.bounded = True  # type: ignore[attr-defined]
    Container.resolve_parse_tree = bounded  # type: ignore[method-assign]
    omegaconf_yaml.get_yaml_loader = _bounding(omegaconf_yaml.get_yaml_loader)


def _bounding(make: Callable[[], Any]) -> Callable[[], Any]:
    def get_yaml_loader() -> Any:
        class Loader(make()):  # type: ignore[misc]
            def __init__(self, stream: Any) -> None:
                super().__init__(whole(stream))
                self.name: str = getattr(stream, "name", "a text in the configuration")

        return Loader

    return get_yaml_loader
