"""Fixtures of all tests: the command line called in-process, and a trained teacher."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.runs import TINY, Cli

gc.disable()  # until all tests are collected
# What a shell starts in the background ignores ctrl-C, and so would all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests neither read nor write the user's cache of annotations.
os.environ["DISTILL_CACHE"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="K/N", help="run the K-th of N parts of the tests, K from 0; a test stays in its part"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep part K of the tests for ``--part K/N``. The name of a test alone decides its part."""
    if config.getoption("--part"):
        part, parts = map(int, config.getoption("--part").split("/"))
        assert 0 <= part < parts, f"--part: expected K/N with 0 <= K < N, got {part}/{parts}"
        others = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts != part]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and the tests: millions of objects that live until the end."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, working in a folder of its own."""
    from distill.cli.main import main

    monkeypatch.chdir(tmp_path)
    return main


@pytest.fixture(scope="session")
def copied_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill.cli.config import compose

    return shutil.copytree(compose.config_folder(), tmp_path_factory.mktemp("conf") / "conf")


@pytest.fixture
def conf(copied_conf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the configuration, whose files a test may change. The next test finds them as they were."""
    from distill.cli.config import compose

    original = compose.config_folder()
    monkeypatch.setattr(compose, "config_folder", lambda: copied_conf)
    yield copied_conf
    for path in sorted(copied_conf.rglob("*"), reverse=True):  # files before their folders
        known = original / path.relative_to(copied_conf)
        if not known.exists():
            path.rmdir() if path.is_dir() else path.unlink()
        elif path.is_file() and path.read_bytes() != known.read_bytes():
            shutil.copy2(known, path)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``distill=none`` on drawn shapes."""
    from distill.cli.main import main

    run = tmp_path_factory.mktemp("teacher") / "run"
    lines = ["train", "model=frcnn_r18_mini", "distill=none", *TINY, "model.backbone.width=0.5", f"hydra.run.dir={run}"]
    assert main(lines) == 0
    return run
