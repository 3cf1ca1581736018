"""Two processes of one run, from the command line: with different words none starts, and none waits forever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from helpers.grids import mostly_exhaustive
from helpers.image_folders import write_coco
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL, started, wait_until

TWO = [*TINY_MODEL, *TINY_HEADS, "distill=none", "trainer=ddp_cpu", "schedule.epochs=500", "pictures=0"]
TWO += ["trainer.save_every=1 steps", "trainer.log_every_n_steps=1", "hydra.run.dir=run"]
TWO += ["callbacks.history.curves=false"]
DRAWN = [*TINY_DATA, "data.batch_size=2"]
PATIENCE = 45.0
"""Seconds that a process waits for another one, with the imports before the first exchange, on a busy machine."""
WAITING = f"trainer.strategy.timeout.minutes={PATIENCE / 60}"
GONE = "rank 0: another process of this run is gone or does not answer"


@contextmanager
def two(lines: Sequence[Sequence[str]], folders: Sequence[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """As torchrun starts them, one on each of two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    with ExitStack() as ended:
        yield [
            ended.enter_context(started([*TWO, *words], folder, env={**os.environ, **known, "LOCAL_RANK": str(rank)}))
            for rank, (words, folder) in enumerate(zip(lines, folders, strict=True))
        ]


@pytest.mark.exhaustive  # ConsistencyCheck has its own daily tests
def test_processes_that_were_given_different_words_stop_before_the_first_step(tmp_path: Path) -> None:
    rates = ([*DRAWN, "data.workers=0", "schedule.epochs=1", f"schedule.optimizer.lr={rate}"] for rate in (0.01, 0.5))
    with two(list(rates), [tmp_path, tmp_path]) as both:
        said = [each.communicate(timeout=300)[1] for each in both]
    assert [each.returncode for each in both] == [1, 1], said
    for words in said:
        assert "have different values:\n  schedule.optimizer.lr: 0.01 on rank 0, 0.5 on rank 1\nStart" in words
        assert "Traceback" not in words
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("metrics.csv"))


def end(process: subprocess.Popen[str], within: float) -> str:
    """What a process says that has to end by itself, with a message, in so many seconds."""
    _, said = process.communicate(timeout=within)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    return said


def with_wrong_pixels(content: bytes) -> bytes:
    """A PNG whose compressed pixels begin with zeros, under a right checksum: only decoding finds it."""
    start = content.index(b"IDAT")
    end = start + 4 + int.from_bytes(content[start - 4 : start], "big")
    damaged = b"IDAT" + bytes(6) + content[start + 10 : end]
    return content[:start] + damaged + zlib.crc32(damaged).to_bytes(4, "big") + content[end + 4 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "seen before they meet": lambda content: content[:-200],
    "seen in the first step": with_wrong_pixels,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", DAMAGE)
def test_images_that_are_broken_on_one_machine_end_the_run_on_both(name: str, tmp_path: Path) -> None:
    """Their headers, and the annotations, are as on the other one."""
    folders = [tmp_path / machine for machine in ("first", "second")]
    for folder in folders:
        write_coco(folder / "pictures")
    for file in (tmp_path / "second" / "pictures" / "train2017").iterdir():
        file.write_bytes(DAMAGE[name](file.read_bytes()))
    lines = ["data=coco", "data.source.root=pictures", "data.min_size=64", "data.max_size=64", "data.workers=0"]
    lines += [WAITING] if "before" in name else []
    with two([lines, lines], folders) as both:
        second, first = (end(each, 300) for each in reversed(both))
    assert GONE in first
    assert "pictures/train2017/0000" in second
    assert not list(tmp_path.rglob("*.ckpt"))


STRUCK: dict[str, tuple[list[str], Callable[[psutil.Process], None], float, float]] = {
    "killed": (["data.workers=1"], psutil.Process.kill, 0.0, 60.0),  # its loader holds its connections open
    "frozen": (["data.workers=0", WAITING], psutil.Process.suspend, PATIENCE - 1, PATIENCE + 60.0),
}
"""Name -> words, what happens to the second process, and the bounds of the seconds in which the first one ends."""


@pytest.mark.parametrize("name", mostly_exhaustive(STRUCK, ["killed"]))
def test_a_process_that_is_gone_is_not_waited_for(name: str, tmp_path: Path) -> None:
    words, strike, least, most = STRUCK[name]
    lines = [*DRAWN, *words]
    with two([lines, lines], [tmp_path, tmp_path]) as (first, second):
        wait_until((tmp_path / "run" / "checkpoints" / "last-1.ckpt").is_file, first)
        strike(psutil.Process(second.pid))
        begun = time.monotonic()
        said = end(first, most)
        took = time.monotonic() - begun
    assert GONE in said
    assert "trainer.strategy.timeout" in said
    assert took > least


def test_a_second_process_that_the_first_one_started_is_not_waited_for_either(tmp_path: Path) -> None:
    """Lightning watches over it, and kills the first one too, but not before that has said why."""
    with started([*TWO, *DRAWN, "data.workers=0"], tmp_path) as run:
        wait_until((tmp_path / "run" / "checkpoints" / "last-1.ckpt").is_file, run)
        (second,) = psutil.Process(run.pid).children()
        second.send_signal(signal.SIGKILL)
        assert GONE in end(run, 60.0)
