"""The bar beside evaluations: drawn on a terminal by rank 0, silent elsewhere, and never in the way of the items."""

from __future__ import annotations

import io

import pytest
import rich
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from distill.progress import track


def drawn(monkeypatch: pytest.MonkeyPatch, terminal: bool, what: str | None) -> str:
    """What stands on the screen after three items."""
    page = io.StringIO()
    console = Console(file=page, force_terminal=terminal, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    assert list(track([3, 1, 2], what)) == [3, 1, 2]
    return page.getvalue()


def test_a_terminal_shows_caption_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "student, val" in drawn(monkeypatch, True, "student, val")


@pytest.mark.parametrize(("terminal", "what"), [(False, "student, val"), (True, None)])
def test_nothing_is_written_elsewhere(terminal: bool, what: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, terminal, what) == ""


def test_only_rank_0_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert drawn(monkeypatch, True, "student, val") == ""


def test_an_error_in_the_loop_closes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(rich, "get_console", lambda: console)

    def fail() -> None:
        for _ in track(range(3), "val"):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    with console.status("another bar can be drawn"):
        pass
