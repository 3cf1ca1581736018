"""Keys of the teacher's run: ``teacher.schedule.epochs=24``, ``teacher.data=DIR``, ``teacher.data.limit=null``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.cli.config.compose import config_groups
from distill.cli.config.data_paths import expand_data_paths
from distill.cli.config.overrides import parse_overrides, write_value
from distill.cli.config.suggestions import nearest
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
            mark = "+" if word.startswith("+") and not word.startswith("++") else "++"
            expanded.append(f"{mark}teacher.{group}{key}={value}")
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


def run_overrides(teacher: Mapping[str, Any], words: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of the teacher's run that the nodes ``teacher.schedule`` and ``teacher.data`` stand for, by group.

    A chosen option comes first. It replaces all overrides of this group that the student's run has. Words of the
    command line follow as they were typed. Keys that tables and experiments set yield to the command line: to an option
    or a key below ``teacher``, to the same key of the student, and to an option of the student's schedule. They do not
    yield to an option of the student's data, which may itself be the reason for them (``data=shapes_100``: the teacher
    has more images).

    Args:
        teacher: the node ``teacher`` of the student's configuration.
        words: the overrides that composed this configuration.
    """
    parsed = parse_overrides(words)
    given = [override.key_or_group for override in parsed]
    overrides: dict[str, list[str]] = {}
    for group in GROUPS:
        node = dict(teacher.get(group) or {})
        option = node.pop(OPTION, None)
        overrides[group] = [f"{group}={option}"] if option else []
        for key, value in leaves(node):
            full = f"{group}.{key}"
            paths = (full, f"teacher.{full}")
            is_given = any(f"{path}.".startswith(f"{name}.") for path in paths for name in given if name != "data")
            if not is_given and f"teacher.{group}.{OPTION}" not in given:
                overrides[group].append(f"{full}={write_value(value)}")
        for override in parsed:
            line, key = str(override.input_line), override.key_or_group
            if key.startswith(f"teacher.{group}.") and key != f"teacher.{group}.{OPTION}":
                is_added = line.startswith("+") and not line.startswith("++")  # as typed, see `expand_teacher_words`
                overrides[group].append("++" * is_added + line.lstrip("+").removeprefix("teacher."))
    return overrides
