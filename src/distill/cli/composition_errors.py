"""Explains why a configuration does not compose: names the invalid override, and the nearest valid names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cli import compose
from distill.cli.suggestions import nearest
from distill.type_checks import leaves

MESSAGE_LENGTH = 600
"""Maximum number of characters that are quoted from a library's message."""


def explain_failure(error: Exception, overrides: Sequence[str]) -> str:
    """The message for a configuration that does not compose: the invalid override and the nearest valid names."""
    known = compose.config_groups()
    for line in overrides:
        key, _, value = line.lstrip("+~").partition("=")
        key = key.split("@")[0]
        if not re.search(r"\.|hydra/", key) and key not in known and key not in _root_keys():
            return f"'{line}': there is no group or key '{key}'{nearest(key, [*known, *_root_keys()])}"
        for option in value.strip("[]").split(",") if key in known else ():
            if option not in ("", "null") and option not in known[key] and f"{key}={option}" not in str(error):
                return f"'{line}': group '{key}' has no option '{option}'{nearest(option, known[key])}"
    if extra := re.search(r"Could not find '(hydra/\w+/(optuna|joblib|submitit)\w*)'", str(error)):
        return f"{extra[1]} is an extra: install 'distill[{extra[2]}]'"
    message = str(error.__cause__ or error).splitlines()[0]
    match = re.search(r"Key '([^']+)' is not in struct", message)
    full = re.search(r"full_key: (\S+)", str(error.__cause__ or error))
    if match:
        path = full.group(1) if full else match.group(1)
        families = _families_with(path)
        owner = (
            f", which weights a loss of {' and '.join(families)}: the student is of another family" if families else ""
        )
        return f"there is no key '{path}'{owner}{nearest(path, _leaf_keys(overrides))}"
    return f"the configuration does not compose: {shorten(str(error), MESSAGE_LENGTH, placeholder='…')}"


def _families_with(path: str) -> list[str]:
    """The detector families that define the loss ``supervised.NAME``; none for any other key."""
    group, _, name = path.partition(".")
    files = sorted((compose.config_folder() / group).glob("*.yaml")) if group == "supervised" else []
    return [file.stem for file in files if name in OmegaConf.load(file)]


def _root_keys() -> list[str]:
    return [
        str(key)
        for key in OmegaConf.load(compose.config_folder() / f"{compose.CONFIG_NAME}.yaml")
        if key not in ("defaults", "hydra")
    ]


def _leaf_keys(overrides: Sequence[str]) -> list[str]:
    chosen = [line for line in overrides if "." not in line.partition("=")[0]]
    try:
        config = compose.compose_config(chosen)
    except (HydraException, OmegaConfBaseException):
        return []
    nodes: Any = OmegaConf.to_container(config)
    return [key for key, _ in leaves(nodes)]
