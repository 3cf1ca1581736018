"""Keys of the teacher's run: ``teacher.schedule.epochs=24``, ``teacher.data=DIR``, ``teacher.data.limit=null``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.cli.compose import config_groups
from distill.cli.data_paths import expand_data_paths
from distill.cli.suggestions import nearest
from distill.type_checks import leaves
from distill.types import DistillError

GROUPS = ("schedule", "data")
"""Groups of the teacher's run that have keys below ``teacher``."""
OPTION = "_option_"
"""Key below ``teacher.schedule`` and ``teacher.data`` that holds the chosen option of the group."""
_WORD = re.compile(rf"\+*teacher\.({'|'.join(GROUPS)})(\.[^=]+)?=(.*)", re.DOTALL)


def expand_teacher_words(words: Sequence[str]) -> list[str]:
    """Turn the keys of the teacher's run into overrides of the nodes ``teacher.schedule`` and ``teacher.data``.

    These nodes hold only what differs from the student's run, so a key is added where there is none.

    Raises:
        DistillError: an option that does not exist, or a path where no data set is recognized.
    """
    expanded: list[str] = []
    for word in words:
        if not (match := _WORD.fullmatch(word)):
            expanded.append(word)
            continue
        group, key, value = match.groups()
        if key:
            expanded.append(f"++teacher.{group}{key}={value}")
            continue
        option, *settings = expand_data_paths([f"{group}={value}"])
        name = option.partition("=")[2]
        known = config_groups()[group]
        for choice in name.split(","):  # a sweep has several
            if choice not in known:
                raise DistillError(f"teacher.{group}={choice}: there is no such option{nearest(choice, known)}")
        expanded.append(f"++teacher.{group}.{OPTION}={name}")
        expanded += [f"++teacher.{setting}" for setting in settings]
    return expanded


def run_overrides(teacher: Mapping[str, Any]) -> dict[str, list[str]]:
    """Overrides of the teacher's run that the nodes ``teacher.schedule`` and ``teacher.data`` stand for, by group.

    A chosen option comes first. It replaces all overrides of this group that the student's run has.
    """
    overrides: dict[str, list[str]] = {}
    for group in GROUPS:
        node = dict(teacher.get(group) or {})
        option = node.pop(OPTION, None)
        overrides[group] = [f"{group}={option}"] if option else []
        overrides[group] += [f"{group}.{key}={json.dumps(value)}" for key, value in leaves(node)]
    return overrides
