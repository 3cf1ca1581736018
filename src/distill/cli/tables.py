"""Tables and labeled lines on the terminal, in one form for all commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.units import MISSING

UNLIMITED = 100_000
"""Width in characters that no table reaches."""


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1, compact: bool = False
) -> None:
    """Print a table, or nothing if it has no rows. None is a missing value.

    Args:
        title: title above the table.
        columns: names of the columns.
        rows: cells of any type.
        left: number of columns that are aligned to the left; numbers are aligned to the right.
        compact: leave out lines between columns, for narrow terminals.
    """
    table = Table(box=SIMPLE if compact else HEAVY_HEAD)
    table.collapse_padding = compact
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(MISSING if cell is None else escape(str(cell)) for cell in row))
    if not table.row_count:
        return
    console = Console()
    widths = console.measure(table, options=console.options.update(width=UNLIMITED))
    # A file has no width. A terminal that is too narrow for the longest word wraps the lines itself.
    console.width = max(console.width, widths.minimum if console.is_terminal else widths.maximum)
    console.print(escape(title), style="italic", highlight=False, soft_wrap=True)
    console.print(table)


def print_line(label: str, text: object, style: str = "bold") -> None:
    """Print a line of text after its label. The terminal wraps long lines, so that paths can be copied."""
    Console().print(
        f"[{style}]{escape(label)}[/]{' ' * max(2, 10 - len(label))}{escape(str(text))}",
        highlight=False,
        soft_wrap=True,
    )


def gib(count: float) -> str:
    """A number of bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"
