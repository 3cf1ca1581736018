"""The command resume: continues a stopped run from its last checkpoint, with the overrides that the run recorded."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from distill.cli.commands import train
from distill.cli.config.config_folders import with_copy_of_run
from distill.cli.config.overrides import parse_overrides, recorded_overrides
from distill.cli.runs.recorded_run import find_run
from distill.quoting import quote_value
from distill.types import DistillError

RESUME_KEYS = ("ckpt_path", "resume")
"""Keys that an earlier resume of the same run may have recorded."""


def main(argv: Sequence[str]) -> int:
    """``distill resume RUN [overrides]``."""
    parser = argparse.ArgumentParser(prog="distill resume", usage="distill resume RUN [overrides]", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, or a checkpoint in this folder")
    parser.add_argument(
        "overrides", nargs="*", help="changes, for example data.workers=0, or trust=[…] as in the run's own command"
    )
    args = parser.parse_intermixed_args(list(argv))
    words = resume_words(args.run, args.overrides)
    return train.main(with_copy_of_run(words, find_run(args.run)))


def resume_words(source: Path, overrides: Sequence[str]) -> list[str]:
    """The words of ``distill train`` that continue a run.

    Args:
        source: the folder of a run, or a checkpoint inside a run's folder.
        overrides: overrides of the command line; they replace those that the run recorded.

    Raises:
        DistillError: the source is no run, the run is finished or has no checkpoint, or an override is a sweep.
    """
    if (source / "sweep.csv").is_file() or (source / "sweep.lock").is_file():
        raise DistillError(
            f"{source} is the folder of a sweep: type the words of the sweep again, with hydra.sweep.dir="
            f"{shlex.quote(str(source))}; finished jobs are not run again"
        )
    run = find_run(source)
    given = parse_overrides(overrides)
    if sweeps := [override.input_line for override in given if override.is_sweep_override()]:
        raise DistillError(f"{sweeps[0]}: resume continues one run: give the key one value")
    replaced = {override.key_or_group for override in given} | set(RESUME_KEYS)
    recorded = recorded_overrides(run.path)
    words = [str(override.input_line) for override in recorded if override.key_or_group not in replaced]
    if not run.resumable:
        raise DistillError(
            f"{run.path} has no checkpoint, so the run starts again:\n"
            f"  {_train_command([*words, *overrides], run.path)}"
        )
    if run.finished and not overrides:
        raise DistillError(
            f"{run.path} has finished: its results are in {run.summary}. To train longer, name the new length and "
            f"accept the change: distill resume {shlex.quote(str(source))} schedule.epochs=N resume=anyway"
        )
    checkpoint = [f"ckpt_path={quote_value(str(source.absolute()))}"] if source.is_file() else ["ckpt_path=last"]
    return [*words, *overrides, *checkpoint, f"hydra.run.dir={quote_value(str(run.path))}"]


def _train_command(words: Sequence[str], run: Path) -> str:
    return shlex.join(["python", "-m", "distill", "train", *words, f"hydra.run.dir={quote_value(str(run))}"])
