"""What stops a run from the command line, and how it goes on: kills, signals, damaged files, another configuration."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY_DATA, TINY_HEADS, TINY_MODEL, Cli
from distill.data.datamodule import Images
from distill.module import Distiller

SMALL = [*TINY_MODEL, *TINY_HEADS, *TINY_DATA, "data.batch_size=2", "trainer.accelerator=cpu", "pictures=0"]
RUN = [*SMALL, "distill=none", "schedule.epochs=2", "hydra.run.dir=run"]


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_student(left: Path, right: Path) -> None:
    ours, theirs = state(left / "student.pt"), state(right / "student.pt")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_ten_kills_later_the_student_is_the_same_to_the_bit(tiny_teacher: Path, tmp_path: Path) -> None:
    """With prototypes, adapters, a ramp and an average, which all have to come back."""
    method = ["distill=global_knowledge", "distill.losses.global_knowledge.prototypes.min_side=6.0"]
    lines = [*SMALL, *method, f"teacher.weights={tiny_teacher}", "callbacks=ema", "callbacks.ema.decay=0.8"]
    lines += ["data.eval_batch_size=2", "schedule.epochs=14", "trainer.save_every=2 steps", "schedule.warmup_steps=9"]
    lines += ["data.photometric=true", "metric=val/AP50"]
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), "7", *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    log = (tmp_path / "log.txt").read_text()[-3000:]
    assert done.returncode == 0, done.stdout + done.stderr + log
    told = done.stdout.splitlines()
    kills = [line for line in told if line.startswith(("in ", "after ", "before ", "between ", "at "))]
    assert len(kills) == 10
    assert len(set(kills)) == 8
    assert_same_student(tmp_path / "whole", tmp_path / "killed")
    for name in ("last", "best"):
        ours, theirs = (state(tmp_path / run / "checkpoints" / f"{name}.ckpt") for run in ("whole", "killed"))
        assert ours["global_step"] == theirs["global_step"]
        for key, value in ours["state_dict"].items():
            assert torch.equal(value, theirs["state_dict"][key]), key
    assert not list((tmp_path / "killed").rglob("*.damaged"))


@pytest.fixture
def finished(cli: Cli, tmp_path: Path) -> Path:
    """The run that was never stopped."""
    assert cli(["train", *RUN]) == 0
    return (tmp_path / "run").rename(tmp_path / "finished")


def signalled(number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Let the run get a signal in its sixth step."""
    step, count = Distiller.training_step, []

    def at_the_sixth(self: Distiller, batch: Any, index: int) -> Any:
        count.append(1)
        if len(count) == 6:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    patch.setattr(Distiller, "training_step", at_the_sixth)


def test_sigterm_saves_says_how_to_go_on_and_exits_with_143(
    cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        signalled(signal.SIGTERM, patch)
        assert cli(["train", *RUN]) == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    said = capsys.readouterr().err
    assert "ckpt_path=last" in said
    assert "Traceback" not in said
    assert state(Path("run/checkpoints/last.ckpt"))["global_step"] == 6
    assert not Path("run/summary.json").exists()
    assert cli(["train", *RUN, "ckpt_path=last"]) == 0
    assert_same_student(finished, Path("run"))


def test_slurm_s_signal_saves_and_the_job_that_is_started_again_goes_on(
    cli: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself: the job's command has no ckpt_path. With a newest checkpoint that was damaged meanwhile."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with monkeypatch.context() as patch:
        signalled(signal.SIGUSR1, patch)
        assert cli(["train", *RUN]) == 143
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Path("run/checkpoints/last.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"Going on from the one before, .*last-1\.ckpt"):
        assert cli(["train", *RUN]) == 0
    assert_same_student(finished, Path("run"))
    assert Path("run/metrics.1.csv").is_file()
    assert cli(["train", *RUN[:-1], "hydra.run.dir=fresh", "schedule.epochs=1"]) == 0  # nothing to go on from


def test_another_configuration_or_data_is_refused_by_name(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["train", *RUN, "schedule.epochs=1"]
    assert cli(lines) == 0
    held = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    refused = {
        "schedule.epochs=3": "schedule.epochs: 1 there, 3 here",
        "schedule.optimizer.lr=0.5": "there, 0.5 here",
        "seed=1": "seed: 0 there, 1 here",
        "callbacks=ema": "callbacks.ema._target_: not there, lightning",
        "trainer.precision=bf16-mixed": "trainer.precision: auto there, bf16-mixed here",
        "data.source.train=12": "train: 8 images with",
        "data.source.classes=[circle,square]": "classes: ['circle', 'square', 'triangle'",
        "data.source.seed=5": "train: 8 images with",
    }
    for line, words in refused.items():
        assert cli([*lines, line, "ckpt_path=last"]) == 1, line
        said = capsys.readouterr().err
        assert words in said, line
        assert "resume=anyway" in said
    # A refusal leaves the run as it was.
    assert {file: file.read_bytes() for file in held} == held
    free = [
        "data.workers=1",
        "trainer.log_every_n_steps=3",
        "logger=tensorboard",
        "trainer.save_every=1 steps",
        "test=false",
    ]
    assert cli([*lines, *free, "ckpt_path=last"]) == 0
    with pytest.warns(UserWarning, match=r"resume=anyway: .*schedule\.epochs: 1 there, 2 here"):
        assert cli([*lines, "schedule.epochs=2", "data.source.train=12", "ckpt_path=last", "resume=anyway"]) == 0
    assert state(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 1
    assert cli([*lines, "resume=perhaps"]) == 1
    assert "expected same or anyway, got 'perhaps'" in capsys.readouterr().err


def test_another_teacher_is_refused_unless_told_otherwise(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    weights = state(tiny_teacher / "student.pt")
    torch.save(
        {name: value + 0.001 if value.is_floating_point() else value for name, value in weights.items()},
        other / "student.pt",
    )
    (other / "student.json").write_text((tiny_teacher / "student.json").read_text())
    lines = ["train", *SMALL, "distill=defeat", "callbacks.teacher.evaluate=false", "hydra.run.dir=run"]
    assert cli([*lines, "schedule.epochs=1", f"teacher.weights={tiny_teacher}"]) == 0
    changed = [*lines, "schedule.epochs=1", f"teacher.weights={other}", "ckpt_path=last"]
    assert cli(changed) == 1
    assert "was made with the teacher" in capsys.readouterr().err
    assert cli([*changed, "resume=anyway"]) == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' list of open files")
def test_a_full_disk_ends_the_run_with_one_message(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sync, written = os.fsync, []

    def full(number: int) -> None:
        written.append(".ckpt." in os.readlink(f"/proc/self/fd/{number}"))
        if sum(written) == 7:  # four of the first epoch's steps, its best and its end; the fifth step's
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli(["train", *RUN, "trainer.save_every=1 steps"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert state(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_killed_loader_is_reported_and_not_waited_for(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, read = os.getpid(), Images.__getitem__

    def killed(self: Images, key: Any) -> Any:
        if os.getpid() != main and key[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, key)

    monkeypatch.setattr(Images, "__getitem__", killed)
    assert cli(["train", *RUN, "data.workers=1"]) == 1
    said = capsys.readouterr().err
    assert "a loader process died" in said
    assert "lower data.workers" in said
    assert state(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 0


def test_stopping_the_student_s_run_stops_its_teacher_s(tmp_path: Path) -> None:
    """The teacher is trained in a process of its own, which would go on alone."""
    lines = [
        *SMALL,
        "distill=defeat",
        "model=frcnn_r10_quarter",
        "schedule.epochs=500",
        'teacher.run=["schedule.epochs=500"]',
    ]
    command = [sys.executable, "-m", "distill", "train", *lines]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.rglob("teachers/*/checkpoints/last.ckpt")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.terminate()
        _, said = process.communicate(timeout=300)
    assert process.returncode == 143
    assert said.count("ckpt_path=last goes on") == 2
