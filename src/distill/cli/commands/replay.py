"""The command replay: repeats the step that stopped a run, with the weights, batch and random draws of its file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from distill.cli.devices import add_device_option, find_device
from distill.cli.startup import uncollected_imports
from distill.quoting import quote_value


def main(argv: Sequence[str]) -> int:
    """``distill replay RUN/non_finite/step….pt [overrides]``: terms of the step, and parameters with bad gradients.

    The models are built from the run's configuration, with the run's teacher. Overrides show whether a change would
    have helped (``distill.losses.ssim.neck.foreground=0``, ``distill=none``). The exit code is 1 if a term or a
    gradient is still not finite.
    """
    parser = argparse.ArgumentParser(prog="distill replay", description=__doc__)
    parser.add_argument("file", type=Path, help="the file that the stopped run named; it must lie in the run's folder")
    add_device_option(parser, "cpu")
    parser.set_defaults(device="cpu")
    parser.add_argument("overrides", nargs="*", help="as for train, added to those of the run")
    args = parser.parse_intermixed_args(list(argv))

    with uncollected_imports():
        from distill.cli.runs.assembly import assemble
        from distill.cli.runs.preflight import plan_run
        from distill.cli.runs.recorded_run import find_run, recompose
        from distill.cli.tables import print_line, print_table
        from distill.diagnostics.replay import read_step, replay
        from distill.training.nonfinite import bad_gradients

    step, run = read_step(args.file), find_run(args.file)
    teacher = [f"teacher.weights={quote_value(str(step['teacher']['source']))}"] if step["teacher"] else []
    overrides = [*teacher, *args.overrides, f"paths.run={quote_value(str(run.path))}"]
    plan = plan_run(recompose(run, overrides))
    module = assemble(plan, plan.data)
    terms = replay(module, step, find_device(args.device))
    bad = bad_gradients(module)
    print_line("step", f"{step['step']}, epoch {step['epoch']}, rank {step['rank']}: {step['found']}")
    for record, replayed in zip(step["batches"], terms, strict=True):
        rows = [
            (name, *map(_number, (record["weights"].get(name), record["terms"].get(name), replayed.get(name))))
            for name in dict.fromkeys([*record["terms"], *replayed])
        ]
        print_table(f"images {list(record['ids'])}", ("term", "weight", "in the run", "in the replay"), rows)
    print_line("not finite", f"gradients of {len(bad)} parameters, {', '.join(bad[:5])}" if bad else "no gradient")
    return int(bool(bad) or not all(math.isfinite(value) for batch in terms for value in batch.values()))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
