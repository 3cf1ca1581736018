"""Data named by its path: ``data=DIR`` becomes the option that reads the folder's format, and its settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distill.cli.config.compose import config_groups
from distill.data.layouts import recognize
from distill.quoting import quote_value


def expand_data_paths(words: Sequence[str]) -> list[str]:
    """Replace ``data=PATH`` by the overrides that read the data set of this path, and say what was recognized.

    ``data.unlabeled=FOLDER`` becomes ``data.unlabeled.images=FOLDER``.

    Other words stay as they are. A ``data.source`` setting among the words is kept.

    Raises:
        DistillError: no format is recognized.
    """
    expanded: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "data.unlabeled" and value[:1] != "{":
            expanded.append(f"data.unlabeled.images={value}")
            continue
        path = Path(_unquote(value)).expanduser()
        if key != "data" or not value or value in config_groups()["data"] or not _is_path(_unquote(value), path):
            expanded.append(word)
            continue
        given = {other.lstrip("+~").partition("=")[0] for other in words}
        layout = recognize(path.absolute(), {key.removeprefix("data.source.") for key in given})
        print(f"data: {value} is {layout.description}", file=sys.stderr)
        settings = [
            f"data.source.{name}={'null' if setting is None else quote_value(setting)}"
            for name, setting in layout.settings.items()
            if f"data.source.{name}" not in given
        ]
        expanded += [f"data={layout.option}", *settings]
    return expanded


def _is_path(value: str, path: Path) -> bool:
    """Whether a value names a path rather than an option with a spelling mistake."""
    return path.exists() or "/" in value or value.endswith((".json", ".yaml", ".yml"))


def _unquote(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
