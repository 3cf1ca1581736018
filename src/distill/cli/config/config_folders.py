"""Folders with the user's own options: ``--config-dir DIR``, the copy in a run's folder, and plugins' folders ``conf``.

Such a folder has the layout of distill's ``conf``: ``distill/my_loss.yaml`` is chosen by ``distill=my_loss``. Its files
follow the same rules as all configuration files, see `target_policy`. Options of distill come first, so that no folder
can replace them.

The flag becomes the override ``config_dirs=[DIR]``, which is passed on to the jobs of a sweep and to the teacher's run.
Like ``trust`` it counts on the command line only: the recorded value is never read. A run copies the files that it used
into its own folder, and ``evaluate``, ``resume`` and ``replay`` compose with this copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from distill import plugins
from distill.cli.config.overrides import parse_overrides
from distill.quoting import quote_value
from distill.run_folder import RunFolder
from distill.types import DistillError

KEY = "config_dirs"
FLAGS = ("--config-dir", "-cd")
SEARCH_PATH = "hydra.searchpath"
"""Hydra's own key for the same. Its values are read as if they were given by the flag."""

_given: tuple[Path, ...] = ()


class OwnFolders(SearchPathPlugin):
    """Lets Hydra find the options of all these folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders after distill's own."""
        for folder in own_folders():
            search_path.append("distill", f"file://{folder}")


def register() -> None:
    """Make the folders known to Hydra."""
    Plugins.instance().register(OwnFolders)


def given_folders() -> list[Path]:
    """The folders that the command line names."""
    return list(_given)


def own_folders() -> list[Path]:
    """The folders of the command line, then those of the installed plugins."""
    return [*_given, *plugins.config_folders()]


def expand_config_dirs(words: Sequence[str]) -> list[str]:
    """Turn ``--config-dir DIR`` and ``hydra.searchpath=[DIR]`` into one override, with absolute paths.

    Raises:
        DistillError: the flag has no value, or a value is not a folder's path.
    """
    kept: list[str] = []
    folders: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, mark, value = word.partition("=")
        if flag in FLAGS:
            folder = value if mark else next(rest, "")
            if not folder:
                raise DistillError(f"{flag}: expected a folder, as in {flag} my_conf")
            folders.append(folder)
        elif flag.lstrip("+") in (KEY, SEARCH_PATH):
            folders += _paths(word)
        else:
            kept.append(word)
    return [*kept, _override(folders)] if folders else kept


def set_config_dirs(words: Sequence[str]) -> None:
    """Store the folders that the words name by ``config_dirs=[…]``, in place of those stored before.

    Raises:
        DistillError: a folder does not exist, or has options of Hydra.
    """
    global _given
    folders = tuple(Path(path) for word in words if word.startswith(f"{KEY}=") for path in _paths(word))
    for folder in folders:
        if not folder.is_dir():
            raise DistillError(f"--config-dir {folder}: there is no such folder")
        if (folder / "hydra").exists():
            raise DistillError(
                f"{folder} has options of Hydra (the folder hydra), which start code before anything is checked. "
                "Remove them, and give Hydra's settings on the command line"
            )
        if not any(folder.glob("*/*.yaml")):
            raise DistillError(f"{folder}: expected options in this folder, such as distill/my_loss.yaml")
    _given = folders


def with_copy_of_run(words: Sequence[str], run: RunFolder) -> list[str]:
    """The words, with the run's own copy of its options after the folders that the words name. Stores the folders.

    Raises:
        DistillError: see `set_config_dirs`.
    """
    copies = [str(run.options.absolute())] if run.options.is_dir() else []
    given = [path for word in words if word.startswith(f"{KEY}=") for path in _paths(word)]
    kept = [word for word in words if not word.startswith(f"{KEY}=")]
    if folders := list(dict.fromkeys([*given, *copies])):
        kept.append(_override(folders))
    set_config_dirs(kept)
    return kept


def _override(folders: Sequence[str]) -> str:
    paths = [str(Path(folder).expanduser().absolute()) for folder in folders]
    paths = [path if re.fullmatch(r"[\w/.-]+", path, re.ASCII) else quote_value(path, mark='"') for path in paths]
    return f"{KEY}=[{','.join(paths)}]"


def _paths(word: str) -> list[str]:
    """The folders that a word names.

    Raises:
        DistillError: a value is no path.
    """
    value = parse_overrides([word])[0].value()
    paths = [str(path).removeprefix("file://") for path in (value if isinstance(value, list) else [value])]
    for path in paths:
        if "://" in path or not path:
            raise DistillError(
                f"'{word}': expected folders. A package adds its options by an entry point in the group {plugins.GROUP}"
            )
    return paths
