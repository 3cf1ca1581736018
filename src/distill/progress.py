"""A progress bar for loops outside Lightning: evaluation before and after training, and prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only

Item = TypeVar("Item")


def track(items: Iterable[Item], caption: str | None) -> Iterator[Item]:
    """Yield the items and show a progress bar meanwhile. The bar disappears after the last item.

    Only rank 0 draws, and only on a terminal or in a notebook: in a log file each refresh would be a line.

    Args:
        items: the items to yield.
        caption: text beside the bar; None: no bar.
    """
    import rich
    from rich.progress import Progress

    console = rich.get_console()  # the console that Lightning's progress bar uses
    if caption is None or getattr(rank_zero_only, "rank", 0) != 0 or not (console.is_terminal or console.is_jupyter):
        yield from items
        return
    with Progress(*Progress.get_default_columns(), console=console, transient=True, refresh_per_second=2) as bar:
        yield from bar.track(items, total=len(items) if isinstance(items, Sized) else None, description=caption)
