"""Prepared sweeps, ``conf/sweep/NAME.yaml``: the configurations of a paper's table or figure, each with its name.

A file has one mapping, ``configurations``: name -> the overrides of this configuration. An override with several values
(``distill.losses.defeat.neck.foreground=1,4``) stands for one configuration for each value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import yaml

from distill.cli.config.compose import SWEEPS, all_folders
from distill.cli.config.overrides import parse_overrides, sweep_key
from distill.cli.config.suggestions import nearest
from distill.types import DistillError


def sweep_names() -> list[str]:
    """Names of the prepared sweeps."""
    return sorted(_files())


def _files() -> dict[str, Path]:
    """Files of the prepared sweeps by name, those in folders of ``--config-dir`` too. The first folder counts."""
    files: dict[str, Path] = {}
    for conf in all_folders():
        for file in sorted((conf / SWEEPS).glob("*.yaml")):
            files.setdefault(file.stem, file)
    return files


def read_sweep(name: str) -> dict[str, list[str]]:
    """The configurations of a prepared sweep: name -> overrides without several values.

    Raises:
        DistillError: there is no such sweep, or its file does not have this form.
    """
    if name not in sweep_names():
        raise DistillError(f"sweep={name}: there is no such sweep{nearest(name, sweep_names())}")
    file = _files()[name]
    return parse_sweep(file.read_text(encoding="utf-8"), file)


def parse_sweep(text: str, file: Path) -> dict[str, list[str]]:
    """The configurations in the text of a file; see `read_sweep`.

    Raises:
        DistillError: the text does not have this form.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DistillError(f"{file}: not YAML: {str(error).splitlines()[0]}") from error
    rows = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise DistillError(f"{file}: expected a mapping 'configurations' of names to lists of overrides")
    configurations: dict[str, list[str]] = {}
    for name, words in rows.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DistillError(f"{file}: {name}: expected a list of overrides, such as [distill=none], got {words}")
        configurations |= _expand(str(name), words)
    return configurations


def _expand(name: str, words: Sequence[str]) -> dict[str, list[str]]:
    """One configuration for each combination of the values of overrides that have several."""
    axes = [
        [f"{sweep_key(override)}={value}" for value in override.sweep_string_iterator()]
        if override.is_discrete_sweep()
        else [f"{sweep_key(override)}={override.get_value_element_as_str()}"]  # as Hydra writes it in a sweep
        for override in parse_overrides(words)
    ]
    configurations = {}
    for chosen in product(*axes):
        varied = [word for word, axis in zip(chosen, axes, strict=True) if len(axis) > 1]
        configurations[", ".join([name, *(word.rpartition("losses.")[2] for word in varied)])] = list(chosen)
    return configurations
