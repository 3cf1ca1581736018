"""Code from outside of distill that files may name: installed plugins, and what the command line trusts.

A plugin is an installed package with an entry point in the group ``distill.plugins``, which names the package:

    [project.entry-points."distill.plugins"]
    my_method = "my_method"

Configurations and files of detectors may name the classes of plugins and of trusted packages. The folder ``conf`` of a
plugin has more options for the command line. A plugin is imported only when one of its classes is used.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import invalidate_caches
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUP = "distill.plugins"

_trusted: tuple[str, ...] = ()


def set_trusted(names: Iterable[str]) -> None:
    """Store the names that the command line trusts, in place of those stored before."""
    global _trusted
    _trusted = tuple(names)


def trusted_by_command_line() -> tuple[str, ...]:
    """The names of ``trust=[…]``."""
    return _trusted


def is_trusted(name: str) -> bool:
    """Whether a dotted name is, or lies in, a plugin or a package that the command line trusts."""
    return is_within(name, (*_trusted, *_plugins()))


def is_within(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is one of these packages, or lies in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def config_folders() -> list[Path]:
    """The folders ``conf`` of the plugins that have one."""
    return [folder for folder in _plugins().values() if folder is not None]


def import_trusted(name: str) -> Any:
    """Import the object that a trusted name refers to. Raises whatever the import raises.

    A module that is found nowhere else is imported from the current folder, which is then added at the end of the
    Python path: the module finds its neighbors, and so do processes that this one starts.
    """
    assert is_trusted(name)
    module = name.partition(".")[0]
    here = Path.cwd()
    if find_spec(module) is None and ((here / f"{module}.py").is_file() or (here / module).is_dir()):
        sys.path.append(str(here))
        invalidate_caches()
    return pkgutil.resolve_name(name)


def _plugins() -> dict[str, Path | None]:
    """Package of each plugin -> its folder ``conf``, or None."""
    return _find_plugins(tuple(sys.path), os.getcwd())


@cache
def _find_plugins(path: tuple[str, ...], here: str) -> dict[str, Path | None]:
    """The plugins on a Python path. Metadata in the current folder is left out: a folder cannot install itself."""
    places = [place for place in path if Path(place).resolve() != Path(here).resolve()]
    points = [point for found in distributions(path=places) for point in found.entry_points if point.group == GROUP]
    return {point.module: _options_of(point.module) for point in points}


def _options_of(package: str) -> Path | None:
    """The folder ``conf`` of a package, which is located without an import."""
    top, *below = package.split(".")
    spec = find_spec(top)
    for home in (spec and spec.submodule_search_locations) or ():
        folder = Path(home, *below, "conf")
        if folder.is_dir():
            return folder.resolve()
    return None
