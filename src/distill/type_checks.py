"""Nested options from files, which may hold values of any type, and their checks against annotations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from reprlib import repr as shorten
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
HYDRA_KEY = re.compile(r"_[a-z]+_")
"""Keys that Hydra reads itself, such as ``_target_`` and ``_partial_``."""
LIST_ANNOTATION = re.compile(r"(?:Sequence|list)\[(\w+)\]")


def type_errors(constructor: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Return one message for each option whose value does not have the type of its parameter.

    Only annotations of scalars, lists of scalars, and unions of these are checked. Options without a parameter of this
    name are skipped.
    """
    parameters = inspect.signature(constructor).parameters
    return [
        f"{name}: expected {' | '.join(_union_members(parameters[name].annotation))}, got {shorten(value)}"
        for name, value in options.items()
        if name in parameters and not matches_annotation(value, parameters[name].annotation)
    ]


def unknown_options(constructor: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Return the names of options that are no parameter of the constructor, without Hydra's own keys.

    A constructor with ``**kwargs`` takes every name, so the list is then empty.
    """
    parameters = inspect.signature(constructor).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in map(str, options) if name not in parameters and not HYDRA_KEY.fullmatch(name)]


def matches_annotation(value: Any, annotation: Any) -> bool:
    """Whether a value has the annotated type; True for annotations that this module cannot check.

    Args:
        value: a value from a file: a scalar or a list.
        annotation: a type, or the annotation's source text.
    """
    return any(_matches_member(value, member) for member in _union_members(annotation))


def _union_members(annotation: Any) -> list[str]:
    if isinstance(annotation, str):
        return annotation.split(" | ")
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _union_members(part)]
    if annotation is type(None):
        return ["None"]
    return [annotation.__name__ if inspect.isclass(annotation) and not get_args(annotation) else str(annotation)]


def _matches_member(value: Any, member: str) -> bool:
    if member in SCALAR_TYPES:
        matches = isinstance(value, SCALAR_TYPES[member]) and isinstance(value, bool) == (member == "bool")
        return matches and (member != "float" or value == value)  # NaN does not count as a number
    list_type = LIST_ANNOTATION.fullmatch(member)
    if list_type is None or list_type[1] not in SCALAR_TYPES:
        return True
    return isinstance(value, (list, tuple)) and all(_matches_member(element, list_type[1]) for element in value)


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


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every nested option. An empty mapping is a value."""
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
