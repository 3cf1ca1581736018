"""Write the comparison of finished runs as an HTML page and, with --wandb, as a report on the W&B site."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distill.cli.tables import print_line
from distill.types import DistillError


def main(argv: Sequence[str]) -> int:
    """``distill report DIR [DIR ...] [--html FILE] [--wandb ENTITY/PROJECT] [--no-images]``."""
    parser = argparse.ArgumentParser(
        prog="distill report",
        usage="distill report DIR [DIR ...] [--html FILE] [--wandb ENTITY/PROJECT] [--no-images]",
        description=__doc__,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="the folder of a sweep or of a run")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="file of the page; default: comparison.html in the first folder"
    )
    parser.add_argument(
        "--wandb",
        metavar="ENTITY/PROJECT",
        help="also make a report and a workspace in this W&B project, which must hold the runs (logger=wandb)",
    )
    parser.add_argument("--no-images", action="store_true", help="leave out the confidence intervals over images")
    args = parser.parse_args(list(argv))
    if missing := [folder for folder in args.folders if not folder.is_dir()]:
        raise DistillError(f"{missing[0]}: there is no such folder. Expected the folder of a sweep or of a run")
    from distill.cli.reports import comparison_report, wandb_report

    site = wandb_report.parse_site(args.wandb) if args.wandb else None
    comparison = comparison_report.compare_paths(args.folders, images=not args.no_images)
    pages = wandb_report.build_pages(comparison, site, f"distill: {args.folders[0].resolve().name}") if site else None
    print_line(
        "report", comparison_report.write_page(comparison, args.html or args.folders[0] / comparison_report.PAGE)
    )
    for address in pages.save() if pages else []:
        print_line("W&B", address)
    return 0
