"""Fixtures of all tests: the command line called in-process, and a trained teacher."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers.runs import TINY, Cli

# What a shell starts in the background ignores ctrl-C, and so would all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, working in a folder of its own."""
    from distill.cli.main import main

    monkeypatch.chdir(tmp_path)
    return main


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``distill=none`` on drawn shapes."""
    from distill.cli.main import main

    run = tmp_path_factory.mktemp("teacher") / "run"
    lines = ["train", "model=frcnn_r18_mini", "distill=none", *TINY, "model.width=0.5", f"hydra.run.dir={run}"]
    assert main(lines) == 0
    return run
