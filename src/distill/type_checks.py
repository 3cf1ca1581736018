"""Whether options are of the kinds that a constructor says it takes: a file may hold anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from reprlib import repr as shown
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from distill.types import DistillError

Options = TypeVar("Options", bound=Any)

SCALAR_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "None": type(None),
}
LIST_ANNOTATION = re.compile(r"(?:Sequence|list)\[(\w+)\]")


def type_errors(constructor: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """One line for each option of another kind than its parameter's annotation names. Only plain ones and lists are judged."""
    found = inspect.signature(constructor).parameters
    return [
        f"{name}: expected {' | '.join(_annotation_parts(found[name].annotation))}, got {shown(value)}"
        for name, value in options.items()
        if name in found and not matches_annotation(value, found[name].annotation)
    ]


def matches_annotation(value: Any, annotation: Any) -> bool:
    """Whether a plain value is what an annotation, as written in the source or as a type, asks for; so where that cannot
    be told.
    """
    return any(_matches_part(value, kind) for kind in _annotation_parts(annotation))


def _annotation_parts(annotation: Any) -> list[str]:
    if isinstance(annotation, str):
        return annotation.split(" | ")
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _annotation_parts(part)]
    if annotation is type(None):
        return ["None"]
    return [annotation.__name__ if inspect.isclass(annotation) and not get_args(annotation) else str(annotation)]


def _matches_part(value: Any, kind: str) -> bool:
    if kind in SCALAR_TYPES:
        right = isinstance(value, SCALAR_TYPES[kind]) and isinstance(value, bool) == (kind == "bool")
        return right and (kind != "float" or value == value)  # NaN is no number
    each = LIST_ANNOTATION.fullmatch(kind)
    if each is None or each[1] not in SCALAR_TYPES:
        return True
    return isinstance(value, (list, tuple)) and all(_is(one, each[1]) for one in value)


def parse_options(name: str, given: Any, default: Options) -> Options:
    """Nested options: the dataclass `default`, with the values of the mapping `given`.

    Args:
        name: of the option, for messages.
        given: a mapping of some or all fields, or an instance.
        default: a frozen dataclass.

    Raises:
        DistillError: an unknown key, or a value of another type than the field's.
    """
    if isinstance(given, type(default)):
        return given
    known = [field.name for field in fields(default)]
    if not isinstance(given, Mapping):
        raise DistillError(
            f"{name}: expected options ({', '.join(known)}), got {given!r}; set one of them: {name}.{known[0]}=…"
        )
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {name}.{close[0]}?" if close else ""
            raise DistillError(f"{name}: unknown option '{key}', expected {', '.join(known)}{hint}")
    if wrong := type_errors(type(default), given):
        raise DistillError("; ".join(f"{name}.{line}" for line in wrong))
    return replace(default, **given)
