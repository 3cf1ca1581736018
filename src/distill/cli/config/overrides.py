"""Overrides as words: parsing, and reading those that a run recorded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from distill.cli.config.instantiate import to_containers
from distill.cli.config.renamed_keys import translated
from distill.cli.config.target_policy import COMMAND_LINE_KEYS
from distill.quoting import quote_value
from distill.run_folder import RunFolder
from distill.type_checks import leaves
from distill.types import DistillError


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra parses them.

    Raises:
        DistillError: a word is not an override.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for word in overrides:
        try:
            parsed += parser.parse_overrides([word])
        except (HydraException, RecursionError) as error:
            raise DistillError(_explain_syntax_error(word, error)) from None
    return parsed


def _explain_syntax_error(word: str, error: Exception) -> str:
    key, _, value = word.partition("=")
    message = f"cannot read the command line at {word}"
    if not value:
        return f"{message}: {str(error).splitlines()[0]}"
    quoted = quote_value(value, mark='"')
    cure = shlex.quote(f"{key}={quoted}")
    return (
        f"{message}: quote values that have = , ' \" ( [ {{ # & ~ or non-ASCII letters, for the shell and again for "
        f"Hydra: {cure}"
    )


def write_value(value: Any) -> str:
    """A value of a configuration as Hydra reads it on the right of an override."""
    return quote_value(value, mark='"') if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def node_overrides(name: str, wanted: Mapping[str, Any], cfg: DictConfig) -> list[str]:
    """Overrides that turn a node of a composed configuration into the wanted node.

    Args:
        name: name of the node, such as ``model``.
        wanted: the wanted node in plain containers.
        cfg: the composed configuration.
    """
    given = dict(leaves(to_containers(cfg[name])))
    wanted = dict(leaves(wanted))
    removed = [f"~{name}.{key}" for key in given if key not in wanted]
    added = [f"+{name}.{key}={write_value(value)}" for key, value in wanted.items() if key not in given]
    changed = [f"{name}.{key}={write_value(wanted[key])}" for key in given if wanted.get(key, given[key]) != given[key]]
    return [*removed, *added, *changed]


def read_overrides(run: Path) -> list[str]:
    """The overrides that a run recorded, with current keys. Their origin is unknown, so they are not trusted.

    Raises:
        DistillError: ``overrides.yaml`` is not a list of overrides.
    """
    file = RunFolder(run).overrides
    lines = _read_yaml(file)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise DistillError(f"{file}: expected a list of overrides, as train writes it")
    return [translated(line) for line in lines]


def read_config(run: RunFolder) -> dict[str, Any]:
    """The resolved configuration that a run recorded.

    Raises:
        DistillError: ``config.yaml`` is not a configuration.
    """
    config = _read_yaml(run.config)
    if not isinstance(config, dict) or not all(isinstance(config.get(node), dict) for node in ("data", "schedule")):
        raise DistillError(f"{run.config}: expected the configuration of a run, as train writes it")
    return config


def _read_yaml(file: Path) -> Any:
    try:
        with file.open(encoding="utf-8") as stream:
            return yaml.safe_load(stream)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DistillError(
            f"{file}: cannot be read ({str(error).splitlines()[0]}). Expected the folder of a run"
        ) from error


def recorded_overrides(run: Path) -> list[Override]:
    """The overrides that a run recorded, without those that only the command line may set.

    These are ``hydra.*``, ``trust`` and ``config_dirs``. A run of a version whose default method was DeFeat for every
    model gets the word for it.

    Raises:
        DistillError: ``overrides.yaml`` is not a list of overrides.
    """
    recorded = [
        override
        for override in parse_overrides(read_overrides(run))
        if not override.is_hydra_override() and override.key_or_group not in COMMAND_LINE_KEYS
    ]
    named = any(override.key_or_group in ("distill", "experiment") for override in recorded)
    if not named and RunFolder(run).config.is_file() and _losses(read_config(RunFolder(run))) == ["defeat"]:
        return [*parse_overrides(["distill=defeat"]), *recorded]
    return recorded


def _losses(config: Mapping[str, Any]) -> list[str]:
    method = config.get("distill")
    losses = method.get("losses") if isinstance(method, dict) else None
    return list(losses) if isinstance(losses, dict) else []


def sweep_key(override: Override) -> str:
    """The key of an override in a sweep's job, with the prefixes ``+`` and ``++``."""
    key = override.get_key_element()
    return ("+" * override.is_add() if not override.is_force_add() else "++") + key.lstrip("+~")


TRAINING_GROUPS = ("distill", "data", "experiment", "start", "model", "supervised", "teacher", "schedule", "init")
"""Groups and keys that name what a run trains and how, in the order of a configuration's name."""
TRAINER_KEYS = ("precision", "max_steps", "max_time", "limit_train_batches", "overfit_batches")
"""Keys of ``trainer`` that change the weights."""


def configuration_name(overrides: Sequence[str]) -> str:
    """The name of a configuration without its seed: its overrides that change the training, or ``defaults``.

    Runs that differ in the seed, the machine or the logging have the same name. The method stands first, because W&B
    cuts long names at their end.
    """
    places = {group: place for place, group in enumerate((*TRAINING_GROUPS, *TRAINER_KEYS))}
    named = [override for override in parse_overrides(overrides) if _group(override) in places]
    named.sort(key=lambda override: places[_group(override)])
    return " ".join(str(override.input_line) for override in named) or "defaults"


def _group(override: Override) -> str:
    return str(override.key_or_group).removeprefix("trainer.").partition(".")[0].partition("/")[0]
