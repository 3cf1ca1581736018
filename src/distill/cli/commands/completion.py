"""Completion of the command line in a shell. Hydra completes overrides; the commands are completed here.

Hydra's shell function calls ``distill -sc query=bash`` with the typed line in ``COMP_LINE``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from unittest.mock import patch

from distill.cli.config import compose, config_folders
from distill.cli.config.hydra_main import answer_flags
from distill.types import DistillError

PATH_FIRST = ("evaluate", "analyze", "resume", "export", "classifier", "replay")
"""Verbs whose first argument is a path, which the shell itself completes; overrides follow."""
FLAGS = ("-sc", "--shell-completion")


def main(argv: Sequence[str], commands: Iterable[str]) -> int:
    """``distill -sc install=bash`` and ``uninstall=bash``, for zsh and fish too; and ``query=…`` for the shell.

    Args:
        argv: words after the command; they include one of `FLAGS`.
        commands: names of the commands.
    """
    line = os.environ.get("COMP_LINE", "")
    with suppress(DistillError):  # a word that is not typed to its end
        config_folders.set_config_dirs(config_folders.expand_config_dirs(line.split()))
    compose.register_options()
    if not any(word.startswith("query=") for word in argv):
        # ``python -m distill`` installs the completion of the command ``distill``.
        name = sys.argv[0] if sys.argv[0].endswith("train.py") else "distill"
        with patch.object(sys, "argv", [name]):
            answer_flags(argv)
        return 0
    start, script, rest = line.partition("train.py")
    if script:
        answer_line(argv, f"{start}{script}", "train", rest)
        return 0
    program, _, rest = line.lstrip().partition(" ")
    command, space, rest = rest.lstrip().partition(" ")
    if not space:
        print(" ".join(name for name in commands if name.startswith(command)))
    elif command in commands and command not in ("predict", "import", "label"):
        answer_line(argv, program, command, rest)
    return 0


def answer_line(argv: Sequence[str], program: str, command: str, rest: str) -> None:
    """Let Hydra complete the last word of a line. Nothing is printed where the shell completes a path.

    Args:
        argv: words with Hydra's flag.
        program: the typed start of the line, without the command.
        command: the command.
        rest: the line after the command.
    """
    words = rest.split()
    current = "" if not rest or rest[-1].isspace() else words.pop()
    has_path = any("=" not in word and not word.startswith("-") for word in words)
    if current.startswith("-") or (command in PATH_FIRST and not has_path):
        return
    overrides = [word for word in words if word in ("-m", "--multirun") or ("=" in word and not word.startswith("-"))]
    with patch.dict(os.environ, COMP_LINE=" ".join([program, *overrides, current])):
        answer_flags(argv)
