"""The verb bench: the cost of distillation and the bottleneck, on this machine with this data and these models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distill.cli import compose
from distill.types import DistillError

COLUMNS = (
    "Columns of the table: teacher, adapters and recompute (student layers that the losses recompute) are relative to "
    "the student's own step. Overhead (loss_overhead) is the part of the step beyond the student's step and these "
    "three: losses, masks, and all operations without weights."
)


def main(argv: Sequence[str]) -> int:
    """``distill bench [--all] [--json FILE] [--repeats 10] [--clock cpu] [overrides]``."""
    parser = argparse.ArgumentParser(prog="distill bench", description=__doc__, epilog=COLUMNS)
    parser.add_argument("--all", action="store_true", help="every distill option that fits, not only the chosen one")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--batches", type=int, default=20, help="batches that the data loader is measured on")
    parser.add_argument("--images", type=int, default=50, help="images that the evaluation is measured on")
    parser.add_argument(
        "--clock", default="wall", help="wall, or cpu: processor time, which varies less on a busy machine"
    )
    parser.add_argument("overrides", nargs="*", help="as for train: model=frcnn_r18 distill=defeat data=coco …")
    args = parser.parse_intermixed_args(list(argv))
    if min(args.repeats, args.batches, args.images) < 1 or args.warmup < 0:
        raise DistillError("bench: --repeats, --batches and --images start at 1, --warmup at 0")
    cfg = compose.compose_without_run(args.overrides)
    configs = {"+".join(cfg.distill.losses): cfg} if cfg.distill.losses else {}
    if args.all:
        lines = compose.parse_overrides(args.overrides)
        kept = [str(line.input_line) for line in lines if line.key_or_group.split(".")[0] != "distill"]
        kept.append(f"paths.run={cfg.paths.run}")
        names = [name for name in compose.config_groups()["distill"] if name != "none"]
        configs = {name: compose.compose_config([*kept, f"distill={name}"]) for name in names}

    from distill.cli.bench_report import measure, print_report
    from distill.cli.preflight import plan_run
    from distill.files import write_text

    options = {name: partial(plan_run, config) for name, config in configs.items()}
    report = measure(plan_run(cfg), options, args)
    print_report(report)
    if args.json:
        write_text(args.json, json.dumps(report.plain(), indent=1))
    return 0
