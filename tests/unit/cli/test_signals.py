"""A process that is asked to stop, and asked again."""

from __future__ import annotations

import os
import signal

import pytest

from distill.cli import signals
from distill.cli.main import main
from distill.cli.signals import Terminated, stop_on_signals


def ask() -> None:
    """Python hears of a signal before its next step."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("later", [False, True])
def test_a_second_signal_does_not_break_off_what_the_first_one_set_going(
    later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the first was long ago: a process that hangs in its clean-up can still be ended."""
    if later:
        monkeypatch.setattr(signals, "REPEATED_SIGNAL_SECONDS", 0.0)
    cleaned: list[str] = []

    def run() -> None:
        try:
            ask()
            cleaned.append("went on")
        finally:
            ask()
            cleaned.append("cleaned")

    with pytest.raises(Terminated), stop_on_signals():
        run()
    assert cleaned == ([] if later else ["cleaned"])


@pytest.mark.parametrize(("stopped", "code"), [(Terminated, 143), (KeyboardInterrupt, 130)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_a_run_speaks_for_all(
    rank: str,
    stopped: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(verb: str, words: list[str]) -> int:
        raise stopped("so it goes on")

    monkeypatch.setattr("distill.cli.main._run", run)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(["train"]) == (code if rank == "0" else 0)
    assert ("so it goes on" in capsys.readouterr().err) == (rank == "0")
