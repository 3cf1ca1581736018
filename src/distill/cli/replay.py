"""The verb replay: the step that stopped a run, done again from its file, with its own weights, batch and draws."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.cli import compose


def main(argv: Sequence[str]) -> int:
    """``distill replay RUN/non_finite/step….pt [overrides]``: its terms, and the parameters whose gradient is not finite.

    The run is built as its configuration says, with its own teacher; overrides try what would have helped
    (``distill.losses.ssim.neck.foreground=0``, ``distill=none``). The exit code is 1 where the step is still not finite.
    """
    parser = argparse.ArgumentParser(prog="distill replay", description=__doc__)
    parser.add_argument("file", type=Path, help="as the stopped run named it; it must lie in the run's folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", help="as for train, on top of the run's own")
    args = parser.parse_intermixed_args(list(argv))

    from distill.cli.evaluate import recompose, run_folder
    from distill.diagnostics.replay import read_step, replay
    from distill.training.nonfinite import bad_gradients

    step = read_step(args.file)
    run = run_folder(args.file)
    named = [f"teacher.weights={compose.quoted(str(step['teacher']['source']))}"] if step["teacher"] else []
    module = build(recompose(run, [*named, *args.overrides, f"paths.run={compose.quoted(str(run))}"]))
    found = replay(module, step, args.device)
    bad = bad_gradients(module)
    show(step, found, bad)
    return int(bool(bad) or not all(math.isfinite(value) for terms in found for value in terms.values()))


def build(cfg: Any) -> Any:
    """The run's Distiller, for its data's classes."""
    from distill.cli.train import assemble

    data = compose.build(cfg.data)
    return assemble(cfg, data)


def show(step: dict[str, Any], found: Sequence[dict[str, float]], bad: Sequence[str]) -> None:
    """What the run saw, and what is seen now."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"step {step['step']}, epoch {step['epoch']}, rank {step['rank']}: {step['found']}", highlight=False)
    for before, now in zip(step["batches"], found, strict=True):
        table = Table(title=f"images {list(before['ids'])}", title_justify="left")
        for name in ("term", "weight", "in the run", "now"):
            table.add_column(name, justify="left" if name == "term" else "right", overflow="fold")
        for name in dict.fromkeys([*before["terms"], *now]):
            cells = (before["weights"].get(name), before["terms"].get(name), now.get(name))
            table.add_row(name, *("–" if value is None else f"{value:.6g}" for value in cells))
        console.print(table)
    words = f"{len(bad)} parameters, {', '.join(bad[:5])}" if bad else "none"
    console.print(f"gradient not finite in: {words}", highlight=False)
