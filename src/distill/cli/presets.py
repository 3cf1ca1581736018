"""Config options that are derived instead of stored in files: default teachers, default metrics and loss names.

``conf/teachers.yaml`` holds the default teacher of each student, ``conf/metrics.yaml`` the default metrics of each data
set. Each line becomes an option of Hydra: ``teacher=of/STUDENT``, ``metrics=of/DATA``. Each model becomes a teacher as
well: ``teacher=MODEL``. ``supervised=of/MODEL`` has the loss names of the model's family. A file of the same name in
``conf`` takes precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from distill.cli.suggestions import nearest
from distill.types import DistillError

_registered: dict[str, dict[str, Any]] = {}


def register_presets(conf: Path) -> None:
    """Make the options of both tables known to Hydra, unless they are registered already."""
    options = preset_options(conf)
    if options == _registered:
        return
    _registered.clear()
    _registered.update(options)
    for option, node in options.items():
        group, _, name = option.rpartition("/")
        ConfigStore.instance().store(name, node, group, provider="distill")
    repo = ConfigStore.instance().repo
    for group in ("teacher", "metrics", "supervised"):
        repo[group] = _SharedGroup(repo.get(group, {}))


class _SharedGroup(dict[str, Any]):
    """A group of the store that is not copied with the store.

    Hydra copies the whole store before every look-up of a group's options, a hundred times for ``--help``. The store
    copies an option anyway when it returns the option.
    """

    def __deepcopy__(self, memo: Any) -> _SharedGroup:
        return self


def preset_options(conf: Path) -> dict[str, dict[str, Any]]:
    """Group and name of each option -> its content, with a defaults list as in a file.

    Raises:
        DistillError: a line names a student, a teacher, a data set or a metric that has no file in ``conf``.
    """
    models, families = _file_names(conf / "model"), _file_names(conf / "supervised")
    nodes: dict[str, dict[str, Any]] = {}
    for model in models:
        nodes[f"teacher/{model}"] = {"defaults": ["base", {"/model@model": model}]}
        family = _target(conf / "model" / f"{model}.yaml")
        nodes[f"supervised/of/{model}"] = {"defaults": [f"/supervised/{family}@_here_"] if family in families else []}
    for model, teacher, options in _rows(conf / "teachers.yaml", models, "teacher"):
        _require_names(conf / "teachers.yaml", model, [teacher], {*models, *_file_names(conf / "teacher")})
        nodes[f"teacher/of/{model}"] = {"defaults": [f"/teacher/{teacher}@_here_"], **options}
    for data, metrics, options in _rows(conf / "metrics.yaml", _file_names(conf / "data"), "metrics"):
        names = [metrics] if isinstance(metrics, str) else metrics
        _require_names(conf / "metrics.yaml", data, names, _file_names(conf / "metrics"))
        nodes[f"metrics/of/{data}"] = {"defaults": [f"/metrics/{name}@_here_" for name in names], **options}
    return {option: node for option, node in nodes.items() if not (conf / f"{option}.yaml").is_file()}


def _target(file: Path) -> str | None:
    """Class name of the detector that a model option builds, also where the option inherits its ``_target_``."""
    content = _mapping(file) if file.is_file() else {}
    inherited = [
        _target(file.with_name(f"{name}.yaml")) for name in content.get("defaults", []) if isinstance(name, str)
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
    except (OSError, ValueError, yaml.YAMLError) as error:
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


def _file_names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "base")
