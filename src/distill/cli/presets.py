"""Config options that a table describes in place of one file each: default teachers and default metrics.

``conf/teachers.yaml`` holds the default teacher of each student, ``conf/metrics.yaml`` the default metrics of each data set.
Each line becomes an option of Hydra: ``teacher=of/STUDENT``, ``metrics=of/DATA``. Each model becomes a teacher as well:
``teacher=MODEL``. A file of the same name in ``conf`` takes precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from distill.cli.suggestions import nearest
from distill.types import DistillError


def register_presets(conf: Path) -> None:
    """Make the options of both tables known to Hydra."""
    for option, node in preset_options(conf).items():
        group, _, name = option.rpartition("/")
        ConfigStore.instance().store(name, node, group, provider="distill")
    repo = ConfigStore.instance().repo
    for group in ("teacher", "metrics"):
        repo[group] = _SharedGroup(repo.get(group, {}))


class _SharedGroup(dict[str, Any]):
    """A group of the store that is not copied with the store. Hydra copies the whole store before each look-up of a group's
    options, a hundred times for ``--help``; the store copies each option anyway when it hands out the option.
    """

    def __deepcopy__(self, memo: Any) -> _SharedGroup:
        return self


def preset_options(conf: Path) -> dict[str, dict[str, Any]]:
    """Group and name of each option -> its content, with a defaults list as in a file.

    Raises:
        DistillError: a line names a student, a teacher, a data set or a metric that has no file in ``conf``.
    """
    models = _file_names(conf / "model")
    nodes: dict[str, dict[str, Any]] = {}
    for model in models:
        nodes[f"teacher/{model}"] = {"defaults": ["base", {"/model@model": model}]}
    for model, teacher, options in _rows(conf / "teachers.yaml", models, "teacher"):
        _require_names(conf / "teachers.yaml", model, [teacher], {*models, *_file_names(conf / "teacher")})
        nodes[f"teacher/of/{model}"] = {"defaults": [f"/teacher/{teacher}@_here_"], **options}
    for data, metrics, options in _rows(conf / "metrics.yaml", _file_names(conf / "data"), "metrics"):
        names = [metrics] if isinstance(metrics, str) else metrics
        _require_names(conf / "metrics.yaml", data, names, _file_names(conf / "metrics"))
        nodes[f"metrics/of/{data}"] = {"defaults": [f"/metrics/{name}@_here_" for name in names], **options}
    return {option: node for option, node in nodes.items() if not (conf / f"{option}.yaml").is_file()}


def _rows(file: Path, names: Iterable[str], key: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, value under ``key`` and further options of each line. A name without a line has that of ``default``."""
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DistillError(f"{file}: cannot be read: {error}") from error
    if not isinstance(table, Mapping) or "default" not in table:
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
