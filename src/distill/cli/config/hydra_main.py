"""Hydra as the engine of runs and sweeps, and the flags of its command line."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli.config import compose
from distill.cli.config.foreign_keys import suggest_words, suggestion
from distill.types import DistillError

CONFIGURATION_FLAGS = (
    ("--config-path", "-cp"),
    ("--config-name", "-cn"),
    ("--experimental-rerun",),
)
"""Flags of Hydra that would replace distill's configuration."""


def parse_words(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The flags of Hydra's command line, including ``overrides``; and all words that are not overrides.

    Raises:
        DistillError: an unknown flag, a flag that would replace distill's configuration, or two flags that exclude each
            other.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for switch in (("--help", "-h"), ("--hydra-help",), ("--shell-completion", "-sc"), ("--resolve",)):
        parser.add_argument(*switch, action="store_true")
    for switch in (("--run", "-r"), ("--multirun", "-m")):
        parser.add_argument(*switch, action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for option in (("--cfg", "-c"), ("--package", "-p"), *CONFIGURATION_FLAGS):
        parser.add_argument(*option)
    flags, unknown = parser.parse_known_args(list(words))
    flags.overrides += [word for word in unknown if not word.startswith("-")]  # overrides after a flag
    flags.runs = not (flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)
    for name in (flag[0] for flag in CONFIGURATION_FLAGS):
        if getattr(flags, name[2:].replace("-", "_")) is not None:
            raise DistillError(
                f"{name}: the configuration is {compose.config_folder()}; --config-dir DIR adds a folder of yours: "
                "experiment=mine then chooses DIR/experiment/mine.yaml"
            )
    if flags.cfg and flags.multirun:
        raise DistillError("--cfg shows the configuration of one run: leave out -m, and give each key one value")
    if other := [word for word in unknown if word.startswith("-")]:
        raise DistillError(_unknown_flag(list(words), other[0]))
    if flags.runs and (flags.resolve or flags.package):
        raise DistillError("--resolve and --package go with --cfg, as in --cfg job --resolve")
    return flags, [word for word in words if word not in flags.overrides]


def _unknown_flag(words: Sequence[str], flag: str) -> str:
    """The message for a flag as other tools have them: ``--epochs 3`` and ``--epochs=3``."""
    name, _, value = flag.partition("=")
    rest = words[words.index(flag) + 1 :]
    if not value and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        value = rest[0]
    if name in ("--resume", "--resume-from"):
        return f"there is no flag {name}; did you mean distill resume {value or 'RUN'}?"
    key = name.lstrip("-").replace("-", "_")
    groups = compose.config_groups()
    suggested = [f"{key}={value}"] if key in groups else suggest_words(f"{key}={value}", groups, [])
    others = "distill train --help shows the options"
    return f"there is no flag {flag}; settings have the form KEY=VALUE{suggestion(suggested, f'; {others}')}"


def run_hydra(overrides: Sequence[str], task: Callable[[DictConfig], Any], mode: RunMode = RunMode.RUN) -> None:
    """Let Hydra compose the configuration and call the task: once, or once for each job of a sweep.

    ``hydra.main`` does the same, but composes the configuration once more to find the mode.

    Args:
        overrides: overrides of the run or sweep.
        task: called with the configuration; a module-level function for a sweep, because launchers pickle it.
        mode: one run, or a sweep.

    Raises:
        DistillError: Hydra cannot execute these overrides.
    """
    try:
        with compose.initialized_hydra():
            engine: Any = GlobalHydra.instance().hydra
            if mode == RunMode.MULTIRUN:
                engine.multirun(compose.CONFIG_NAME, task, [*overrides, "hydra.mode=MULTIRUN"])
            else:
                engine.run(compose.CONFIG_NAME, task, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise _refusal(error) from error


def answer_flags(words: Sequence[str]) -> None:
    """Let Hydra answer a flag that starts no run, such as ``--help``. Hydra reads the words from ``sys.argv``.

    Raises:
        DistillError: the configuration of these words does not compose.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints an error and exits; messages are main's task
    command_line = sys.argv
    sys.argv = [command_line[0], *words]
    answer = io.StringIO()
    printed = redirect_stdout(answer) if {"--help", "-h"} & set(words) else nullcontext()
    try:
        with printed:
            hydra.main(version_base="1.3", config_path=str(compose.config_folder()), config_name=compose.CONFIG_NAME)(
                lambda cfg: None
            )()
    except (HydraException, OmegaConfBaseException) as error:
        raise _refusal(error) from error
    finally:  # Hydra exits after its help
        sys.argv = command_line
        print(wrapped_help(answer.getvalue()), end="")


def wrapped_help(text: str) -> str:
    """Hydra's help with wrapped lists of options, without what nobody chooses: derived groups, and options ``base``."""
    width = min(120, shutil.get_terminal_size().columns)
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        group = re.match(r"([\w/]+): \w", line)
        if group is None:
            lines.append(line)
        elif "/" not in group[1] and group[1] != compose.SWEEPS:
            choices = re.sub(r"(?<= )base(, |$)", "", line)  # other options inherit from it
            lines.append(
                textwrap.fill(choices, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
                + "\n"
            )
    return "".join(lines)


def _refusal(error: Exception) -> DistillError:
    if several := re.search(r"Ambiguous value for argument '([^']+)'", str(error)):
        key, _, value = several[1].partition("=")
        return DistillError(
            f"'{several[1]}' has several values: add -m (--multirun) for a sweep with one job for each value, or write "
            f"a list: {shlex.quote(f'{key}=[{value}]')}"
        )
    return DistillError(str(error).partition("Config search path")[0].strip())
