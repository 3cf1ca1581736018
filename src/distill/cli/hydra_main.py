"""Hydra as the entry point of runs and sweeps, through `hydra.main`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli import compose
from distill.types import DistillError

CONFIGURATION_FLAGS = (
    ("--config-path", "-cp"),
    ("--config-name", "-cn"),
    ("--config-dir", "-cd"),
    ("--experimental-rerun",),
)
"""Flags of Hydra that would replace distill's configuration."""


def parse_words(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The flags that are needed before Hydra runs, including ``overrides``; and all words that are not overrides.

    Raises:
        DistillError: a flag that would replace distill's configuration, or two flags that exclude each other.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for switch in (("--help", "-h"), ("--hydra-help",), ("--multirun", "-m"), ("--shell-completion", "-sc")):
        parser.add_argument(*switch, action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    configuration = (
        ("--config-path", "-cp"),
        ("--config-name", "-cn"),
        ("--config-dir", "-cd"),
        ("--experimental-rerun",),
    )
    for option in (("--cfg", "-c"), ("--package", "-p"), *configuration):
        parser.add_argument(*option)
    flags, unknown = parser.parse_known_args(list(words))
    flags.overrides += [word for word in unknown if not word.startswith("-")]  # overrides after a flag
    if flags.cfg and flags.multirun:
        raise DistillError("--cfg shows the configuration of one run: leave out -m, and give each key one value")
    for name in (flag[0] for flag in CONFIGURATION_FLAGS):
        if getattr(flags, name[2:].replace("-", "_")) is not None:
            raise DistillError(
                f"{name}: the configuration is {compose.config_folder()}; put a file of yours there, "
                "experiment/mine.yaml say, and choose it by experiment=mine"
            )
    flags.runs = not (flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)
    return flags, [word for word in words if word not in flags.overrides]


def run_hydra(words: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra compose the configuration of these words and call the task, or answer a flag such as ``--help``.

    Hydra reads the words from ``sys.argv``. A task that starts processes restores ``sys.argv`` first, because
    Lightning starts the processes with the command line of this process.

    Args:
        words: overrides and flags.
        task: called with the configuration; a module-level function for a sweep, because launchers pickle it.

    Raises:
        DistillError: Hydra cannot execute these words.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints an error and exits; messages are main's task
    command_line = sys.argv
    sys.argv = [command_line[0], *words]
    try:
        hydra.main(version_base="1.3", config_path=str(compose.config_folder()), config_name=compose.CONFIG_NAME)(
            task
        )()
    except (HydraException, OmegaConfBaseException) as error:
        raise DistillError(str(error).partition("Config search path")[0].strip()) from error
    finally:
        sys.argv = command_line
