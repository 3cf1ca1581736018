"""List the distillation methods with their options, detectors, terms and papers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distill.cli.tables import print_table

COMBINE = """
Several methods can be combined: 'distill=[pkd,dist]'. Combine methods that compare different things (features,
relations, outputs). Of methods that compare the same thing, choose one, and choose only one option of a method. This
command measures their cost on this machine: distill bench 'distill=[pkd,dist]'"""


def main(argv: Sequence[str]) -> int:
    """``distill methods [NAME ...]``."""
    parser = argparse.ArgumentParser(prog="distill methods", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="name of a method or of an option of distill=; default: all"
    )
    names = sorted({name.lower() for name in parser.parse_args(list(argv)).names})
    from distill.cli.reports.method_table import method_rows

    rows = list(method_rows(names))
    cells = (
        (
            row.option,
            ", ".join(row.kinds),
            "all pairs" if len(row.pairs) == 4 else ", ".join(row.pairs),
            ", ".join(f"{term} {weight:g}" for term, weight in row.terms.items()),
            f"{row.name}: {row.paper}",
        )
        for row in rows
    )
    print_table("Methods", ("distill=", "compares", "student and teacher", "terms and weights", "paper"), cells, left=5)
    for name, idea in {row.name: row.idea for row in rows if names}.items():
        print(f"{name}: {idea}.")
    print(COMBINE.strip())
    return 0
