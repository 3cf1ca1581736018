"""List the distillation methods with their options, detectors, terms and papers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distill.cli.tables import print_table

COMBINE = """
Several methods can be combined: 'distill=[pkd,dist]'. Choose at most one option from each line of the last table: two
methods at one place cause a warning, unless distill.same_place=allow. Balance their weights on your data with
distill.balance=gradient. Step: duration of a training step, relative to that of the student alone, on one CPU thread
with small detectors. This command measures it on this machine: distill bench 'distill=[pkd,dist]'"""


def main(argv: Sequence[str]) -> int:
    """``distill methods [NAME ...]``."""
    parser = argparse.ArgumentParser(prog="distill methods", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="name of a method or of an option of distill=; default: all"
    )
    # Folders of --config-dir are set already; their word, config_dirs=[…], is no name.
    names = sorted({name.lower() for name in parser.parse_args(list(argv)).names if "=" not in name})
    from distill.cli.reports.method_table import grouped, method_rows, options_by_place, partners, refusals

    rows = list(method_rows(names))
    cells = (
        (
            row.option,
            ", ".join(row.kinds),
            ", ".join(grouped(row.pairs)),
            ", ".join(f"{term} {weight:g}" for term, weight in row.terms.items()),
            f"{row.name}: {row.paper}",
            "" if row.cost is None else f"{row.cost:.1f}",
        )
        for row in rows
    )
    columns = ("distill=", "compares", "student and teacher", "terms and weights", "paper", "step")
    print_table("Methods", columns, cells, left=5)
    for name, idea in {row.name: row.idea for row in rows if names}.items():
        print(f"{name}: {idea}.")
    if names:
        everything = list(method_rows())
        for row in rows:
            for pairs, reason in refusals(row).items():
                print(f"{row.option} refuses {pairs}: {reason}")
            print(f"{row.option} may be added to {', '.join(partners(row, everything)) or 'no other option'}.")
    by_place = ((place, ", ".join(options)) for place, options in options_by_place(rows).items())
    print_table("At most one option from each line", ("place", "options"), by_place, left=2)
    print(COMBINE.strip())
    return 0
