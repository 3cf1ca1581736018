"""What stops a run from the command line, and how it goes on: kills, signals, damaged files, another configuration."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.main import main
from distill.cli.reports import run_report
from distill.cli.runs.shared_run import SharedRun
from distill.data.datamodule import DetectionData
from distill.data.images import ImageDataset
from distill.data.loader import SIGTERM_GRACE
from distill.training.callbacks.teacher_check import TeacherCheck
from distill.training.distiller import Distiller
from helpers import kill_runs, leave_loader_open
from helpers.grids import exhaustive, mostly_exhaustive
from helpers.runs import TINY_DATA, TINY_HEADS, TINY_MODEL, TINY_QUERIES, Cli, started, wait_until

SMALL = [*TINY_MODEL, *TINY_HEADS, *TINY_DATA, "data.batch_size=2", "trainer.accelerator=cpu", "pictures=0", "cost=0"]
SMALL += ["callbacks.history.curves=false"]
RUN = [*SMALL, "distill=none", "schedule.epochs=2", "hydra.run.dir=run"]


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_student(left: Path, right: Path) -> None:
    ours, theirs = state(left / "student.pt"), state(right / "student.pt")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


PROTOTYPES = [*SMALL, "distill=global_knowledge", "distill.losses.global_knowledge.prototypes.min_side=6.0"]
"""A run with prototypes, adapters, a ramp and an average, which must all be restored."""
QUERIES = ["model=rtdetr_mini", *TINY_QUERIES, *SMALL[len(TINY_MODEL) + len(TINY_HEADS) :], "schedule=detr"]
"""A set-prediction detector, whose denoising queries are drawn in every step."""


def killed(
    how: str, seed: int, kills: int, lines: list[str], teacher: Path, folder: Path, run: Sequence[str] = PROTOTYPES
) -> list[str]:
    """Output of kill_runs.py for a run."""
    lines = [*run, f"teacher.weights={teacher}", "callbacks=ema", "callbacks.ema.decay=0.8", *lines]
    lines += ["data.photometric=true", "data.eval_batch_size=2", "metric=val/AP50"]
    command = [sys.executable, str(Path(kill_runs.__file__)), how, str(folder), str(seed), str(kills), *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    log = (folder / "log.txt").read_text()[-3000:]
    assert done.returncode == 0, done.stdout + done.stderr + log
    return done.stdout.splitlines()


def assert_same_history(whole: Path, killed: Path) -> None:
    """No row is missing, repeated or different, but for the seconds."""
    for name in ("metrics.csv", "steps.csv"):
        ours, theirs = (list(csv.DictReader((run / name).open())) for run in (whole, killed))
        for row in (*ours, *theirs):
            row.pop("seconds", None)
            row.pop("evaluation_seconds", None)
        assert ours, name
        assert ours == theirs, name
    assert not list(killed.glob("metrics.*.csv"))


def assert_same_run(whole: Path, killed: Path) -> None:
    assert_same_student(whole, killed)
    assert_same_history(whole, killed)
    for name in ("last", "best"):
        ours, theirs = (state(run / "checkpoints" / f"{name}.ckpt") for run in (whole, killed))
        assert ours["global_step"] == theirs["global_step"]
        for key, value in ours["state_dict"].items():
            assert torch.equal(value, theirs["state_dict"][key]), key
    assert not list(killed.rglob("*.damaged"))


@pytest.mark.parametrize(("kills", "epochs"), [(8, 9), exhaustive((10, 14))])
def test_after_a_kill_at_each_event_the_student_is_the_same_to_the_bit(
    kills: int, epochs: int, tiny_teacher: Path, tmp_path: Path
) -> None:
    lines = [f"schedule.epochs={epochs}", "trainer.save_every=2 steps", "schedule.warmup_steps=9"]
    told = killed("events", 7, kills, lines, tiny_teacher, tmp_path)
    events = [line for line in told if line in kill_runs.EVENTS]
    assert len(events) == kills
    assert set(events) == set(kill_runs.EVENTS)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.exhaustive
def test_a_killed_student_with_matched_queries_is_the_same_to_the_bit(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    taught = [*QUERIES, "schedule.epochs=1", "distill=none", "test=false", "hydra.run.dir=teacher"]
    assert cli(["train", *taught]) == 0
    lines = ["schedule.epochs=5", "trainer.save_every=2 steps", "schedule.warmup_steps=9"]
    run = [*QUERIES, "distill=detr_logits"]
    told = killed("events", 3, 8, lines, tmp_path / "teacher", tmp_path, run)
    assert len([line for line in told if line in kill_runs.EVENTS]) == 8
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kills", "epochs"), [(5, 4), (10, 8)])
def test_killed_at_any_moments_whatever_they_do_runs_end_with_the_same_bits(
    kills: int, epochs: int, tiny_teacher: Path, tmp_path: Path
) -> None:
    """With loaders, which may not outlive their run, and steps of two batches."""
    lines = ["data.workers=2", "schedule.accumulate=2", f"schedule.epochs={epochs}", "schedule.warmup_steps=5"]
    told = killed("moments", 5, kills, [*lines, "trainer.save_every=1 steps"], tiny_teacher, tmp_path)
    moments = [line for line in told if line.startswith("killed")]
    assert len(moments) == kills
    assert any(", 0 loaders" not in line for line in moments), moments
    assert any("1 resumed" in line for line in moments), moments
    runs = sorted(tmp_path.glob("killed*"))
    assert len(runs) > 1 or kills < 10
    for run in runs:
        assert_same_run(tmp_path / "whole", run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *RUN[:-1], f"hydra.run.dir={run}"]) == 0
    return run


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
    assert "python -m distill resume" in said
    assert "Traceback" not in said
    assert state(Path("run/checkpoints/last.ckpt"))["global_step"] == 6
    assert not Path("run/summary.json").exists()
    assert cli(["resume", "run"]) == 0
    assert_same_student(finished, Path("run"))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM's; the file to which its tool's calls are written."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path / "asked"


def struck(owner: Any, name: str, number: signal.Signals, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the process get a signal when it comes to a function; a list that stays empty if that is the end of it."""
    went_on: list[str] = []

    def strike(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(0)
        went_on.append(name)
        raise AssertionError(name)

    patch.setattr(owner, name, strike)
    return went_on


BEFORE: dict[str, tuple[Any, str]] = {
    "the data checks": (DetectionData, "setup"),
    "waiting for a teacher": (SharedRun, "train"),
    "the opening words": (run_report, "print_opening"),
    "the teacher's evaluation": (TeacherCheck, "on_train_start"),
}


BEFORE_STEPS = list(itertools.product(BEFORE, [signal.SIGTERM, signal.SIGUSR1]))


@pytest.mark.parametrize(
    ("place", "number"), mostly_exhaustive(BEFORE_STEPS, [BEFORE_STEPS[place] for place in (0, 2, 3, 4, 6)])
)
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    place: str,
    number: signal.Signals,
    cli: Cli,
    asked: Path,
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    known = [] if "waiting" in place else [f"teacher.weights={tiny_teacher}"]
    went_on = struck(*BEFORE[place], number, monkeypatch)
    assert cli(["train", *SMALL, "distill=defeat", "hydra.run.dir=run", *known]) == 143
    assert went_on == []
    said = capsys.readouterr().err
    assert "distill: stopped by a signal; start it again with the same arguments\n" in said
    assert "Traceback" not in said
    assert asked.exists() == (number == signal.SIGUSR1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_closing_evaluation_that_was_cut_is_made_by_the_resume(
    number: signal.Signals, cli: Cli, asked: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is trained; what is left is its result."""
    with pytest.MonkeyPatch.context() as patch:
        struck(run_report, "evaluate", number, patch)
        assert cli(["train", *RUN]) == 143
    assert "continues from the last checkpoint" in capsys.readouterr().err
    assert not Path("run/summary.json").exists()
    assert asked.exists() == (number == signal.SIGUSR1)
    assert cli(["train", *RUN, "ckpt_path=last"]) == 0
    assert_same_student(finished, Path("run"))
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (Path("run"), finished))
    assert ours["student"] == theirs["student"]


@pytest.mark.parametrize(("number", "code"), [exhaustive((signal.SIGUSR1, 143)), (signal.SIGINT, 130)])
def test_a_signal_to_every_process_leaves_the_loaders_their_last_batch(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """As SLURM and a terminal send it: the step that is made still gets its images, and the run is saved."""
    lines = [*SMALL, "distill=none", "schedule.epochs=500", "data.workers=2", "trainer.save_every=1 steps"]
    with started([*lines, "hydra.run.dir=run"], tmp_path) as run:
        wait_until((tmp_path / "run" / "checkpoints" / "last-1.ckpt").is_file, run)
        os.killpg(run.pid, number)
        _, said = run.communicate(timeout=900)
    assert run.returncode == code, said
    assert "continues from the last checkpoint" in said
    assert "loader process died" not in said


def test_of_two_processes_one_is_told_and_both_leave(tmp_path: Path) -> None:
    """Together, after a step; one of them speaks."""
    lines = [*SMALL, "distill=none", "schedule.epochs=500", "trainer=ddp_cpu", "trainer.save_every=1 steps"]
    with started([*lines, "hydra.run.dir=run"], tmp_path) as run:
        wait_until((tmp_path / "run" / "checkpoints" / "last-1.ckpt").is_file, run)
        run.terminate()
        _, said = run.communicate(timeout=900)  # until the last one has closed its end
    assert run.returncode == 143, said
    assert said.count("continues from the last checkpoint") == 1
    assert "Traceback" not in said
    held = state(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert held["made_by"]["processes"] == len(held["resume"]["random"]) == 2


def test_slurm_s_signal_saves_and_the_job_that_is_started_again_goes_on(
    cli: Cli, finished: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself: the job's command has no ckpt_path. With a newest checkpoint that was damaged meanwhile."""
    with monkeypatch.context() as patch:
        signalled(signal.SIGUSR1, patch)
        assert cli(["train", *RUN]) == 143
    assert asked.read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Path("run/checkpoints/last.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"The run resumes from the previous one, .*last-1\.ckpt"):
        assert cli(["train", *RUN]) == 0
    assert_same_student(finished, Path("run"))
    assert_same_history(finished, Path("run"))
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
        "callbacks=ema": "callbacks.ema._target_: not there, distill",
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
    main, read = os.getpid(), ImageDataset.__getitem__

    def killed(self: ImageDataset, key: Any) -> Any:
        if os.getpid() != main and key[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, key)

    monkeypatch.setattr(ImageDataset, "__getitem__", killed)
    assert cli(["train", *RUN, "data.workers=1"]) == 1
    said = capsys.readouterr().err
    assert "a loader process died" in said
    assert "lower data.workers" in said
    assert state(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 0


def test_stopping_the_student_s_run_stops_its_teacher_s(tmp_path: Path) -> None:
    """The teacher is trained in a process of its own, which would go on alone."""
    small = [f"teacher.{line}" for line in (*TINY_MODEL, *TINY_HEADS)]
    endless = ["schedule.epochs=500", 'teacher.run=["schedule.epochs=500","trainer.save_every=1 steps"]']
    with started([*SMALL, *small, *endless, "distill=defeat"], tmp_path) as process:
        wait_until(lambda: list(tmp_path.rglob("teachers/*/checkpoints/last.ckpt")), process)
        process.terminate()
        _, said = process.communicate(timeout=900)
    assert process.returncode == 143
    assert said.count("continues from the last checkpoint") == 1  # the teacher's
    assert said.count("stopped by a signal; start it again") == 1


def test_a_script_that_lets_no_loader_go_ends_all_the_same_and_leaves_others_alone() -> None:
    """Its loaders outlive one SIGTERM, but not their script: it would wait for them for ever."""
    script = Path(leave_loader_open.__file__)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=SIGTERM_GRACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "took one\nasked to end\n"
