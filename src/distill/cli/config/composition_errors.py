"""Explains why a configuration does not compose: names the invalid override, and the nearest valid names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cli.config import compose
from distill.cli.config.foreign_keys import suggest_words, suggestion
from distill.cli.config.presets import loss_names, option_files
from distill.cli.config.suggestions import nearest
from distill.type_checks import leaves

MESSAGE_LENGTH = 600
"""Maximum number of characters that are quoted from a library's message."""


def explain_failure(error: Exception, overrides: Sequence[str]) -> str:
    """The message for a configuration that does not compose: the invalid override and the nearest valid names."""
    known = compose.config_groups()
    for line in overrides:
        key, _, value = line.lstrip("+~").partition("=")
        key = key.split("@")[0]
        if not re.search(r"\.|hydra/", key) and key not in known and key not in compose.root_keys():
            return unknown_key(line, _leaf_keys(overrides))
        for option in value.strip("[]").split(",") if key in known else ():
            if option not in ("", "null") and option not in known[key] and f"{key}={option}" not in str(error):
                several = option.split("+")
                joined = [f"[{','.join(several)}]"] if set(several) <= set(known[key]) else []
                close = joined or get_close_matches(option, known[key], n=3, cutoff=0.5)
                options = suggestion((f"{key}={name}" for name in close), f"; known: {', '.join(sorted(known[key]))}")
                return f"'{line}': group '{key}' has no option '{option}'{options}"
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
        word = next(
            (line for line in overrides if f"{line.lstrip('+~').partition('=')[0]}.".startswith(f"{path}.")), path
        )
        if (loss := re.fullmatch(r"distill\.losses\.(\w+)", path)) and loss[1] in known["distill"]:
            return (
                f"'{word}': no chosen option of distill has the loss '{loss[1]}': choose distill={loss[1]}, or leave "
                "this word out"
            )
        keys = _leaf_keys(overrides)
        return f"there is no key '{path}'{owner}{suggestion(suggest_words(word, known, keys), nearest(path, keys))}"
    return f"the configuration does not compose: {shorten(str(error), MESSAGE_LENGTH, placeholder='…')}"


def unknown_key(word: str, keys: Sequence[str] | None = None) -> str:
    """The message for a word whose key is no group and no key, with the words to write instead.

    Args:
        word: the word ``KEY=VALUE``.
        keys: full keys of the configuration. None: those of the default configuration.
    """
    groups = compose.config_groups()
    key = word.lstrip("+~").partition("=")[0]
    words = suggest_words(word, groups, _leaf_keys([]) if keys is None else keys)
    return (
        f"'{word}': there is no group or key '{key}'{suggestion(words, nearest(key, [*groups, *compose.root_keys()]))}"
    )


def _families_with(path: str) -> list[str]:
    """The detector families that define the loss ``supervised.NAME``; none for any other key."""
    group, _, name = path.partition(".")
    losses = loss_names(option_files(compose.all_folders(), "model")) if group == "supervised" else {}
    return sorted(family for family, names in losses.items() if name in names)


def _leaf_keys(overrides: Sequence[str]) -> list[str]:
    groups = compose.config_groups()
    chosen = [line for line in overrides if line.lstrip("+").partition("=")[0] in groups]
    try:
        config = compose.compose_config(chosen)
    except (HydraException, OmegaConfBaseException):
        return []
    nodes: Any = OmegaConf.to_container(config)
    return [key for key, _ in leaves(nodes)]
