"""Config options that are derived instead of stored in files: default teachers, methods and metrics, and loss names.

``conf/teachers.yaml`` holds the default teacher of each student, ``conf/metrics.yaml`` the default metrics of each data
set. Each line becomes an option of Hydra: ``teacher=of/STUDENT``, ``metrics=of/DATA``. Each model becomes a teacher as
well: ``teacher=MODEL``. ``supervised=of/MODEL`` has the loss names of the model's family, ``distill=of/MODEL`` the
method that ``conf/methods.yaml`` names for this family. ``schedule=of/DATA`` is ``schedule=auto``. Models and data sets
in folders of the user have these options, too. A file of the same name takes precedence.
"""

from __future__ import annotations

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
    conf, files = folders[0], {group: _files(folders, group) for group in FILE_GROUPS}
    models, families = files["model"], files["supervised"]
    methods = _mapping(conf / "methods.yaml")
    _require_names(conf / "methods.yaml", "the table", list(methods.values()), files["distill"])
    nodes: dict[str, dict[str, Any]] = {}
    for model in models:
        nodes[f"teacher/{model}"] = {"defaults": ["base", {"/model@model": model}]}
        family = _target(model, models)
        nodes[f"supervised/of/{model}"] = {"defaults": [f"/supervised/{family}@_here_"] if family in families else []}
        method = methods.get(str(family), methods["default"])
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


def _target(model: str, models: Mapping[str, Path], heirs: Sequence[str] = ()) -> str | None:
    """Class name of the detector that a model option builds, also where the option inherits its ``_target_``.

    Args:
        model: name of the option.
        models: name -> file of all options.
        heirs: options that inherit from this one.

    Raises:
        DistillError: a file is invalid.
    """
    if model not in models:
        return None
    if model in heirs:
        raise DistillError(f"{models[model]}: inherits from itself")
    content = _mapping(models[model])
    bases = content.get("defaults", [])
    inherited = [
        _target(name, models, (*heirs, model))
        for name in (bases if isinstance(bases, list) else [])
        if isinstance(name, str)
    ]
    targets = [*inherited, str(content["_target_"]).rpartition(".")[2] if "_target_" in content else None]
    return next((target for target in reversed(targets) if target), None)


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
    return yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


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


def _files(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """Name -> file of the options of a group, by name. The first folder that has a file of this name counts."""
    files = [file for folder in reversed(folders) for file in (folder / group).glob("*.yaml") if file.stem != "base"]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}
