"""A progress bar for what runs outside Lightning's loops: evaluations before and after training, and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str | None) -> Iterator[Item]:
    """The items, with a bar beside the caption ``what`` that is gone once they are through; None for no bar.

    Only rank 0 draws, and only on a terminal: elsewhere a bar would be lines in a log.
    """
    import rich
    from rich.progress import Progress

    console = rich.get_console()  # Lightning's bar draws on this one too
    if what is None or getattr(rank_zero_only, "rank", 0) != 0 or not (console.is_terminal or console.is_jupyter):
        yield from items
        return
    with Progress(*Progress.get_default_columns(), console=console, transient=True, refresh_per_second=2) as bar:
        yield from bar.track(items, total=len(items) if isinstance(items, Sized) else None, description=what)
