"""The verb doctor: checks data, teacher and losses in about a minute before a run, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from distill.cli import compose


def main(argv: Sequence[str]) -> int:
    """``distill doctor [--json FILE] [overrides as for train]``: exit code 0 for a run that is ready, 1 for faults."""
    parser = argparse.ArgumentParser(prog="distill doctor", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("overrides", nargs="*", help="as for train: data=voc data.source.root=… distill=ssim")
    args = parser.parse_intermixed_args(list(argv))
    cfg = compose.compose_without_run(args.overrides)

    from distill.cli.doctor_report import examine
    from distill.cli.doctor_tables import print_report
    from distill.files import write_text

    report = examine(cfg)
    print_report(report)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1))
    return int(report["verdict"] != "ready")
