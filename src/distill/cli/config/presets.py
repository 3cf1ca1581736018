"""Config options that are derived instead of stored in files: default teachers, methods and metrics, and loss names.

``conf/teachers.yaml`` holds the default teacher of each student, ``conf/metrics.yaml`` the default metrics of each data
set. Each line becomes an option of Hydra: ``teacher=of/STUDENT``, ``metrics=of/DATA``. Each model becomes a teacher as
well: ``teacher=MODEL``. ``distill=of/MODEL`` is the method that ``conf/methods.yaml`` names for the model's family.
``schedule=of/DATA`` is ``schedule=auto``. Models and data sets in folders of the user have these options, too. A file
of the same name takes precedence.

The file of a detector family, such as ``conf/model/fcos.yaml``, names the family's own losses in its first line,
``# @losses NAME,NAME``. It is a comment, because all keys of the file are arguments of the constructor. The line
becomes the option ``supervised=CLASS``, with a weight of 1 for each loss. ``supervised=of/MODEL`` is the option of the
model's class, or of the nearest class that the model inherits from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from distill.cli.config.suggestions import nearest
from distill.types import DistillError

DERIVED_GROUPS = ("teacher", "metrics", "supervised", "schedule", "distill")
"""Groups of the derived options."""
FILE_GROUPS = ("model", "teacher", "supervised", "data", "metrics", "distill")
"""Groups whose files decide which options are derived."""
DEFAULT_METHOD = "distill/of/"
"""Prefix of the options that stand for a student's default method."""
_LOSSES = re.compile(r"# @losses (\w+(?:,\w+)*)\n")

_registered: dict[str, dict[str, Any]] = {}


def register_presets(folders: Sequence[Path]) -> None:
    """Make the derived options known to Hydra, unless they are registered already; see `preset_options`."""
    options = preset_options(folders)
    if options == _registered:
        return
    _registered.clear()
    _registered.update(options)
    repo = ConfigStore.instance().repo
    for group in DERIVED_GROUPS:
        repo.pop(group, None)
    for option, node in options.items():
        group, _, name = option.rpartition("/")
        ConfigStore.instance().store(name, node, group, provider="distill")
    for group in DERIVED_GROUPS:
        repo[group] = _SharedGroup(repo.get(group, {}))


class _SharedGroup(dict[str, Any]):
    """A group of the store that is not copied with the store.

    Hydra copies the whole store before every look-up of a group's options, a hundred times for ``--help``. The store
    copies an option anyway when it returns the option.
    """

    def __deepcopy__(self, memo: Any) -> _SharedGroup:
        return self


def preset_options(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Group and name of each option -> its content, with a defaults list as in a file.

    Args:
        folders: distill's ``conf``, which has the tables, and the user's folders of options.

    Raises:
        DistillError: a line names a student, a teacher, a data set or a metric that has no file; or a file of a model
            is invalid.
    """
    conf, files = folders[0], {group: option_files(folders, group) for group in FILE_GROUPS}
    models = files["model"]
    methods = _mapping(conf / "methods.yaml")
    _require_names(conf / "methods.yaml", "the table", list(methods.values()), files["distill"])
    losses = loss_names(models)
    nodes: dict[str, dict[str, Any]] = {f"supervised/{name}": dict.fromkeys(losses[name], 1.0) for name in losses}
    families = {*losses, *files["supervised"]}
    for model in models:
        nodes[f"teacher/{model}"] = {"defaults": ["base", {"/model@model": model}]}
        family = _family(model, models, families)
        nodes[f"supervised/of/{model}"] = {"defaults": [f"/supervised/{family}@_here_"] if family else []}
        method = methods.get(family, methods["default"])
        nodes[f"{DEFAULT_METHOD}{model}"] = {"defaults": [f"/distill/{method}@_global_.distill.losses.{method}"]}
    for model, teacher, options in _rows(conf / "teachers.yaml", models, "teacher"):
        _require_names(conf / "teachers.yaml", model, [teacher], {*models, *files["teacher"]})
        nodes[f"teacher/of/{model}"] = {"defaults": [f"/teacher/{teacher}@_here_"], **options}
    for data, metrics, options in _rows(conf / "metrics.yaml", files["data"], "metrics"):
        names = [metrics] if isinstance(metrics, str) else metrics
        _require_names(conf / "metrics.yaml", data, names, files["metrics"])
        nodes[f"metrics/of/{data}"] = {"defaults": [f"/metrics/{name}@_here_" for name in names], **options}
        nodes[f"schedule/of/{data}"] = {"defaults": ["/schedule/auto@_here_"]}
    known = {option for option in nodes if any((folder / f"{option}.yaml").is_file() for folder in folders)}
    return {option: node for option, node in nodes.items() if option not in known}


def loss_names(models: Mapping[str, Path]) -> dict[str, list[str]]:
    """Class name of each detector family -> the names of its own losses.

    Args:
        models: name -> file of the options of the group ``model``.

    Raises:
        DistillError: a file is invalid.
    """
    names = {}
    for file in models.values():
        content, losses = _read_model(file)
        if losses:
            names[_class_name(content)] = losses
    return names


def _family(model: str, models: Mapping[str, Path], families: Iterable[str], heirs: Sequence[str] = ()) -> str:
    """Class name of a model's family: of its own class, or of the nearest inherited one; empty where none is known.

    Args:
        model: name of the option.
        models: name -> file of all options.
        families: class names of the known families.
        heirs: options that inherit from this one.

    Raises:
        DistillError: a file is invalid.
    """
    if model not in models:
        return ""
    if model in heirs:
        raise DistillError(f"{models[model]}: inherits from itself")
    content, _ = _read_model(models[model])
    if (class_name := _class_name(content)) in families:
        return class_name
    bases = content.get("defaults", [])
    names = [name for name in reversed(bases) if isinstance(name, str)] if isinstance(bases, list) else []
    return next(filter(None, (_family(name, models, families, (*heirs, model)) for name in names)), "")


def _class_name(model: Mapping[str, Any]) -> str:
    return str(model.get("_target_", "")).rpartition(".")[2]


def _read_model(file: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The mapping in the file of a model, and the losses that its first line names.

    Raises:
        DistillError: the file cannot be read, holds no mapping, or names losses without a class.
    """
    content, text = _mapping(file), _read(file, file.stat().st_mtime_ns)
    names = _LOSSES.match(text)
    if text.startswith("# @losses") and not (names and _class_name(content)):
        raise DistillError(f"{file}: expected '# @losses NAME,NAME' in the file of a class, which has a _target_")
    return content, names[1].split(",") if names else []


def _mapping(file: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        DistillError: the file cannot be read, or holds no mapping.
    """
    try:
        content = _parse(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DistillError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise DistillError(f"{file}: expected a mapping")
    return content


@cache
def _parse(file: Path, modified: int) -> Any:
    """The content of a YAML file, which is parsed again only after it was modified."""
    return yaml.load(_read(file, modified), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def _read(file: Path, modified: int) -> str:
    """The text of a file, which is read again only after it was modified."""
    return file.read_text(encoding="utf-8")


def _rows(file: Path, names: Iterable[str], key: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, value under ``key`` and further options of every name. A name without a line has those of ``default``."""
    table = _mapping(file)
    if "default" not in table:
        raise DistillError(f"{file}: expected a mapping of names with a line 'default'")
    _require_names(file, "the table", [name for name in table if name != "default"], names)
    rows = []
    for name in names:
        value = table.get(name, table["default"])
        options = dict(value) if isinstance(value, Mapping) else {key: value}
        rows.append((name, options.pop(key, None), options))
    return rows


def _require_names(file: Path, row: str, names: Any, known: Iterable[str]) -> None:
    for name in names if isinstance(names, list) else [names]:
        if name not in known:
            raise DistillError(f"{file}: {row}: there is no option '{name}'{nearest(str(name), known)}")


def option_files(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """Name -> file of the options of a group, by name. The first folder that has a file of this name counts."""
    files = [file for folder in reversed(folders) for file in (folder / group).glob("*.yaml") if file.stem != "base"]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}
