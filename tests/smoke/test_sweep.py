"""A sweep: a failed job is a row and does not end the sweep, a finished job is not repeated, every job is a process."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from distill.cli.runs.sweep import claim_folder, run_process
from distill.cli.signals import Terminated, stop_on_signals
from helpers.runs import TINY, Cli, started, summary, wait_until

NONE = ["distill=none", *TINY, "pictures=0", "test=false"]


def epochs(run: Path) -> list[str]:
    return [row["epoch"] for row in csv.DictReader((run / "metrics.csv").open())]


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


def test_a_failed_job_is_recorded_and_the_next_ones_run(
    cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    axis = "schedule.shape=stairs,constant"
    assert cli(["train", "-m", axis, *NONE, "hydra.sweep.dir=sweep"]) == 1
    said = capfd.readouterr()
    assert "1 of the sweep's jobs failed, the first: job 0: schedule.shape: expected one of" in said.err
    assert "job 0 failed: schedule.shape: expected one of" in said.out
    first, second = rows(tmp_path / "sweep")
    assert (first["state"], second["state"]) == ("failed", "done")
    assert first["error"].startswith("schedule.shape: expected one of step")
    assert float(second["val/AP"]) >= 0

    finished = (tmp_path / "sweep" / "1" / "student.pt").stat().st_mtime_ns
    other = ["schedule.shape=stairs", "schedule.gamma=0.5"]
    assert cli(["train", "-m", *other, *NONE, "hydra.sweep.dir=sweep"]) == 1
    assert [row["state"] for row in rows(tmp_path / "sweep")] == ["failed", "done", "failed"]
    assert (tmp_path / "sweep" / "1" / "student.pt").stat().st_mtime_ns == finished


@pytest.mark.exhaustive  # `make test` runs joblib's jobs in the test below
@pytest.mark.parametrize(
    "launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]], ids=lambda words: words[0]
)
def test_any_launcher_of_hydra_runs_a_sweep(launcher: list[str], tmp_path: Path) -> None:
    """Jobs of several processes at once: one table, a failed job is a row, and the same words run what is not done."""
    words = [
        "-m",
        "schedule.shape=constant,stairs",
        *NONE,
        "hydra.sweep.dir=sweep",
        f"hydra/launcher={launcher[0]}",
    ]
    command = [sys.executable, "-m", "distill", "train", *words, *launcher[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stderr
    assert "1 of the sweep's jobs failed, the first: job 1: schedule.shape: expected one of" in done.stderr
    assert [(row["schedule.shape"], row["state"]) for row in rows(tmp_path / "sweep")] == [
        ("constant", "done"),
        ("stairs", "failed"),
    ]
    finished = (tmp_path / "sweep" / "0" / "student.pt").stat().st_mtime_ns
    words[1] = "schedule.shape=constant,step"
    command = [sys.executable, "-m", "distill", "train", *words, *launcher[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in rows(tmp_path / "sweep")] == ["done", "failed", "done"]
    assert (tmp_path / "sweep" / "0" / "student.pt").stat().st_mtime_ns == finished


def test_stopping_a_sweep_of_jobs_at_once_leaves_no_process(tmp_path: Path) -> None:
    data = [line for line in NONE if not line.startswith(("schedule.epochs", "trainer.max_steps"))]
    lines = ["-m", "seed=0,1", *data, "schedule.epochs=500", "hydra.sweep.dir=sweep"]
    lines += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    with started(lines, tmp_path) as running:
        wait_until(lambda: len(list(tmp_path.glob("sweep/*/checkpoints/last.ckpt"))) == 2, running)
        jobs = psutil.Process(running.pid).children(recursive=True)
        running.terminate()
        _, said = running.communicate(timeout=900)
    assert running.returncode == 143, said
    assert "sweep' with the same words again runs what is not done" in said.splitlines()[-1]
    assert not psutil.wait_procs(jobs, timeout=60)[1]
    assert [row["state"] for row in rows(tmp_path / "sweep")] == ["unfinished"] * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("weights", ["1", "1,2"])
def test_a_key_of_one_method_applies_to_the_jobs_of_this_method(
    weights: str, cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "-m",
        "distill=none,mimic",
        f"distill.losses.mimic.regions.all={weights}",
        f"teacher.weights={tiny_teacher}",
        *TINY,
    ]
    assert cli(["train", *words, "pictures=0", "hydra.sweep.dir=sweep"]) == 0
    done = [(row["distill"], row["distill.losses.mimic.regions.all"]) for row in rows(tmp_path / "sweep")]
    assert sorted(done) == [*(("mimic", weight) for weight in weights.split(",")), ("none", "")]
    for row in rows(tmp_path / "sweep"):
        losses = OmegaConf.load(tmp_path / "sweep" / row["job"] / "config.yaml").distill.losses
        expected = [float(row["distill.losses.mimic.regions.all"])] if row["distill"] == "mimic" else []
        assert [loss.regions["all"] for loss in losses.values()] == expected


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Killed after its second job's first epoch: the first is not run again, the second is resumed."""
    data = [line for line in NONE if not line.startswith(("schedule.epochs", "trainer.max_steps"))]
    lines = ["-m", "seed=0,1", *data, "schedule.epochs=6", "hydra.sweep.dir=a sweep"]
    command = [sys.executable, "-m", "distill", "train", *lines]
    command[command.index("hydra.sweep.dir=a sweep")] = "hydra.sweep.dir='a sweep'"
    sweep = tmp_path / "a sweep"
    running = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (sweep / "1" / "checkpoints" / "last.ckpt").is_file():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert (sweep / "0" / "summary.json").is_file()
    done_before = (sweep / "1" / "summary.json").is_file()
    finished = (sweep / "0" / "student.pt").stat().st_mtime_ns
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert [row["state"] for row in rows(sweep)] == ["done"] * 2
    assert [row["seed"] for row in rows(sweep)] == ["0", "1"]
    assert (sweep / "0" / "student.pt").stat().st_mtime_ns == finished
    assert done_before or "ckpt_path=last" in (sweep / "1" / "overrides.yaml").read_text()
    assert [epochs(sweep / job) for job in ("0", "1")] == [list("123456")] * 2


def test_a_sweep_that_is_asked_to_stop_passes_it_on_and_goes_on_later(tmp_path: Path) -> None:
    """It alone is told; the job that runs saves, is no failure, and is resumed by the same words."""
    sweep = tmp_path / "sweep"
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    data = [line for line in NONE if not line.startswith(("schedule.epochs", "trainer.max_steps"))]
    lines = ["-m", "seed=0", *data, "schedule.epochs=12", "trainer.save_every=1 steps", "hydra.sweep.dir=sweep"]
    last = sweep / "0" / "checkpoints" / "last.ckpt"
    steps = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)):
        before = last.stat().st_mtime_ns if steps else 0
        with started(lines, tmp_path, env=env) as running:
            wait_until(lambda since=before: last.is_file() and last.stat().st_mtime_ns != since, running)
            running.send_signal(number)
            _, said = running.communicate(timeout=900)
        assert running.returncode == code, said
        assert "continues from the last checkpoint" in said  # the job
        assert "sweep' with the same words again runs what is not done" in said.splitlines()[-1]
        assert [(row["state"], row.get("error")) for row in rows(sweep)] == [("unfinished", None)]
        assert not (sweep / "0" / "error.txt").exists()
        assert (tmp_path / "asked").exists() == (number != signal.SIGTERM)
        found = torch.load(last, weights_only=True)["global_step"]
        assert found > steps
        steps = found
    assert (tmp_path / "asked").read_text() == "requeue 17\n"  # the job itself asks for nothing
    assert (sweep / "slurm_job").read_text() == "17"  # by which it is found when SLURM starts it again
    with started(lines, tmp_path) as running:
        _, said = running.communicate(timeout=900)
    assert running.returncode == 0, said
    assert [row["state"] for row in rows(sweep)] == ["done"]
    assert epochs(sweep / "0") == [str(number) for number in range(1, 13)]
    assert torch.load(last, weights_only=True)["global_step"] == 24


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGUSR1], [signal.SIGINT], [signal.SIGTERM] * 2])
def test_a_job_is_waited_for_however_much_it_has_to_say(numbers: list[signal.Signals], tmp_path: Path) -> None:
    """More than a pipe holds, so that somebody has to listen until its end."""
    code = f"""
import pathlib, signal, sys, time
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.5)
    sys.stderr.write("word\\n" * 100_000)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
while True:
    time.sleep(1)
"""

    def tell() -> None:
        while not (tmp_path / "ready").is_file():
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(KeyboardInterrupt if signal.SIGINT in numbers else Terminated), stop_on_signals():
        run_process([sys.executable, "-c", code], "it")
    teller.join()
    assert (tmp_path / "saved").is_file()


@pytest.mark.exhaustive
def test_a_job_of_several_processes(tmp_path: Path) -> None:
    lines = ["-m", "seed=0", "trainer=ddp_cpu", *NONE, "hydra.sweep.dir=sweep"]
    command = [sys.executable, "-m", "distill", "train", *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in rows(tmp_path / "sweep")] == ["done"]
    assert [folder.name for folder in (tmp_path / "sweep").iterdir() if folder.is_dir()] == ["0"]
    assert summary(tmp_path / "sweep" / "0")["student"]["val/AP"] >= 0
    assert done.stderr.count("GLOBAL_RANK") == 2


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_sweep_that_is_started_by_every_process_is_refused(
    variable: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")  # of the job, whose batch script is one process
    monkeypatch.setenv(variable, "2")
    assert cli(["train", "-m", "seed=0,1", *NONE]) == 1
    assert "start the sweep anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('distill: two\\ndistill: three', file=sys.stderr); sys.exit(1)", (1, "three")),
        ("print('Boom: x\\n', file=sys.stderr); sys.exit(3)", (3, "exit code 3: Boom: x")),
        ("sys.exit(4)", (4, "exit code 4")),
        ("os.kill(os.getpid(), 9)", (-9, "killed by SIGKILL")),
        (
            "print(os.environ['DISTILL_SWEEP'], os.environ.get('RANK'), file=sys.stderr); sys.exit(1)",
            (1, "exit code 1: it None"),
        ),
    ],
)
def test_what_a_job_says_last_is_kept(code: str, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    assert run_process([sys.executable, "-c", f"import os, sys; {code}"], "it") == expected


def test_a_job_has_the_folder_that_holds_its_words(tmp_path: Path) -> None:
    def make(name: str, *lines: Any) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        if lines:
            (tmp_path / name / "overrides.yaml").write_text(json.dumps(lines))
        return tmp_path / name

    make("0", "seed=0", "model=x")
    make("1", "seed=1", "model=x", "ckpt_path=last")
    given = make("2")
    assert claim_folder(tmp_path, given, ["model=x", "seed=1"]) == tmp_path / "1"
    assert not given.exists()
    assert claim_folder(tmp_path, make("2"), ["seed=2", "model=x"]) == tmp_path / "2"
    assert claim_folder(tmp_path, tmp_path / "1", ["seed=5", "model=x"]) == tmp_path / "3"
    assert claim_folder(tmp_path, tmp_path / "0", ["seed=0", "model=x"]) == tmp_path / "0"
