"""The jobs of a sweep and their table. Every job runs in a separate process.

The table has one row per job, on the terminal and in ``sweep.csv``. A job that fails is recorded, and the other jobs go
on. A sweep with the same ``hydra.sweep.dir`` continues the earlier sweep: finished jobs in that folder are not run
again, and jobs with a checkpoint are resumed.

Any launcher of Hydra can start the jobs: one after another (the default), several at once (``hydra/launcher=joblib
hydra.launcher.n_jobs=2``, ``hydra/launcher=submitit_local``) or on a cluster (``hydra/launcher=submitit_slurm``, which
has not been tested). Jobs that run at the same time share all GPUs of the machine. The launchers of submitit end a job
after ``hydra.launcher.timeout_min=60`` minutes; submitit_local starts all jobs together.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from distill.cli.config import compose, config_folders, override_checks, target_policy
from distill.cli.config.hydra_main import run_hydra
from distill.cli.config.overrides import parse_overrides
from distill.cli.runs import resume
from distill.cli.runs.child_runs import child_environment, wait_for_process
from distill.cli.runs.sweep_folder import count_done, count_failed, job_folders, recorded_words, write_table
from distill.cli.signals import Terminated
from distill.files import write_text
from distill.quoting import quote_value
from distill.run_folder import RunFolder
from distill.types import DistillError
from distill.units import duration

JOBS_VARIABLE, START_VARIABLE, DONE_VARIABLE = "DISTILL_SWEEP_JOBS", "DISTILL_SWEEP_START", "DISTILL_SWEEP_DONE"
"""Environment variables for the processes of launchers: number of jobs, start, jobs finished before the start."""
FIXED_VARIABLE = "DISTILL_SWEEP_FIXED"
"""Environment variable: the overrides that all jobs share, one per line."""
BEFORE_VARIABLE = "DISTILL_SWEEP_BEFORE"
"""Environment variable: the number of jobs in earlier parts of the sweep."""


class JobFailed(DistillError):
    """A job failed. Hydra's sweepers raise this after the other jobs are done."""


def run_job(cfg: DictConfig) -> float:
    """Run or resume one job of a sweep in a separate process, unless the job is already finished.

    Hydra's launchers call this function, some of them in other processes. Jobs share nothing but the sweep's folder.

    Returns:
        The metric that the configuration names.

    Raises:
        JobFailed: the last message of the run.
    """
    compose.register_resolvers()
    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir)
    words = [str(line) for line in hydra.overrides.task]
    target_policy.set_trusted(words)  # the process of a launcher does not know them yet
    config_folders.set_config_dirs(words)
    overrides = override_checks.applicable_overrides(words)
    run = claim_folder(sweep, Path(hydra.runtime.output_dir), overrides)
    number = int(os.environ.get(BEFORE_VARIABLE, "0")) + int(hydra.job.num) + 1
    print(progress_line(sweep, number, words, overrides, run), flush=True)
    with FileLock(f"{run}.lock"):  # jobs that differ only in a key that applies to neither are the same job
        if not RunFolder(run).finished:
            _run_process_of_job(run, overrides, sweep.name)
    return float(json.loads(RunFolder(run).summary.read_text())["student"][cfg.metric])


def _run_process_of_job(run: Path, overrides: Sequence[str], sweep: str) -> None:
    RunFolder(run).error.unlink(missing_ok=True)
    resumption = ["ckpt_path=last"] if RunFolder(run).resumable else []
    words = [*overrides, *resumption, f"hydra.run.dir={quote_value(str(run))}"]
    code, error = run_process([sys.executable, "-m", "distill", "train", *words], sweep)
    if code == 130:
        raise KeyboardInterrupt
    if code or not RunFolder(run).finished:
        write_text(RunFolder(run).error, error)
        raise JobFailed(f"job {run.name}: {error}")


class SweepTable(Callback):
    """Hydra's callback that writes ``sweep.csv`` from the folders of the jobs, which may run in any process."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the table after a job, in the process that ran the job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            write_table(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the table after all jobs, in the process that started the sweep."""
        write_table(Path(config.hydra.sweep.dir))


def choose_folder(words: Sequence[str], cfg: DictConfig) -> Path:
    """The folder of a sweep: the given one, that of a sweep which SLURM started again, or a new one.

    Args:
        words: overrides of the sweep.
        cfg: the configuration of the first job, with the ``hydra`` node.

    Raises:
        DistillError: torchrun or SLURM starts this very sweep more than once; a key is given twice, or ``ckpt_path``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise DistillError(
            "a sweep (-m) under torchrun or in several tasks of SLURM: each process would start the sweep anew. Start "
            "it once; every job starts its own processes (trainer=ddp)"
        )
    if any(word.startswith("ckpt_path=") for word in words):
        raise DistillError("ckpt_path with -m: a sweep goes on by itself where it stopped: hydra.sweep.dir=DIR")
    refuse_repeated_keys(words)
    HydraConfig.instance().set_config(cfg)  # for interpolations into it
    return resume.requeued_sweep(words) or Path(cfg.hydra.sweep.dir)


def run_jobs(folder: Path, parts: Sequence[tuple[Sequence[str], int]]) -> None:
    """Run the jobs of a sweep that are not done.

    Args:
        folder: folder of the sweep.
        parts: one after another, the overrides of jobs of which Hydra runs all combinations, and their number.

    Raises:
        JobFailed: at least one job failed, and the others are done.
        Terminated, KeyboardInterrupt: the sweep is asked to stop; the message says how to continue.
    """
    resume.write_slurm_job(folder)
    shared = [word for word in parts[0][0] if all(word in words for words, _ in parts)]
    os.environ |= {
        JOBS_VARIABLE: str(sum(count for _, count in parts)),
        START_VARIABLE: str(time.time()),
        DONE_VARIABLE: str(count_done(folder)),
        FIXED_VARIABLE: "\n".join(shared),
    }
    failures: list[JobFailed] = []
    before = 0
    try:
        for words, count in parts:
            os.environ[BEFORE_VARIABLE] = str(before)
            others = [word for word in words if not word.startswith("hydra.sweep.dir=")]
            try:
                run_hydra([f"hydra.sweep.dir={quote_value(str(folder))}", *others], run_job, RunMode.MULTIRUN)
            except JobFailed as error:
                failures.append(error)
            before += count
    except (Terminated, KeyboardInterrupt) as stopped:
        raise type(stopped)(*(stopped.args or [continuation_advice(folder)])) from None
    finally:
        for name in (JOBS_VARIABLE, START_VARIABLE, DONE_VARIABLE, FIXED_VARIABLE, BEFORE_VARIABLE):
            os.environ.pop(name, None)
    if failures:
        raise JobFailed(f"{count_failed(folder)} of the sweep's jobs failed, the first: {failures[0]}")


def refuse_repeated_keys(words: Sequence[str]) -> None:
    """Refuse a key that is given twice in a sweep, once with several values: Hydra would use the last word only.

    Raises:
        DistillError: names both words.
    """
    given: dict[str, Override] = {}
    for override in parse_overrides(words):
        key = override.key_or_group
        first = given.setdefault(key, override)
        if first is not override and (override.is_sweep_override() or first.is_sweep_override()):
            raise DistillError(
                f"{key} is given twice, as {first.input_line} and as {override.input_line}: give all its values in one "
                "word"
            )


def count_jobs(words: Sequence[str], cfg: DictConfig) -> int:
    """Number of jobs that Hydra starts for a sweep: all combinations, or the trials of a tuner."""
    sweeper = cfg.hydra.sweeper
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    axes = {override.key_or_group: override for override in parse_overrides(words)}
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    axes = {override.key_or_group: override for override in parse_overrides(params)} | axes
    groups = compose.config_groups()
    total = 1
    for key, override in axes.items():
        value = override.value()
        if isinstance(value, Glob):
            total *= len(value.filter(groups.get(key, [])))
        elif override.is_discrete_sweep():
            total *= len(list(override.sweep_string_iterator()))
    return total


def progress_line(sweep: Path, number: int, words: Sequence[str], overrides: Sequence[str], run: Path) -> str:
    """The lines that a job prints first: its number, the overrides that vary, and the time so far and left.

    Args:
        sweep: folder of the sweep.
        number: number of the job, from 1.
        words: overrides of the job as Hydra gives them.
        overrides: the overrides that apply to the job.
        run: folder of the job.
    """
    jobs, before = (int(os.environ.get(name, "0")) for name in (JOBS_VARIABLE, DONE_VARIABLE))
    line = f"job {number} of {jobs}" if jobs else f"job {number}"
    shared = os.environ.get(FIXED_VARIABLE, "").splitlines()
    line += f", folder {run.name}: {' '.join(word for word in overrides if word not in shared)}"
    kept = {word.lstrip("+") for word in overrides}
    if unused := [word.lstrip("+") for word in words if word.lstrip("+") not in kept]:
        line += f"\n  without {' '.join(unused)}: this job has no such loss"
        line += "; an earlier job is the same and is not repeated" if RunFolder(run).finished else ""
    elapsed = time.time() - float(os.environ.get(START_VARIABLE, time.time()))
    done = count_done(sweep) - before
    if done > 0 and jobs:
        left = elapsed / done * max(0, jobs - number + 1)
        line += f"\n  {duration(elapsed)} elapsed, about {duration(left)} left"
    return line


def continuation_advice(folder: Path) -> str:
    """Text that says how to continue a sweep."""
    return f"hydra.sweep.dir='{folder}' with the same words again runs what is not done"


def claim_folder(sweep: Path, given: Path, overrides: Sequence[str]) -> Path:
    """Choose the folder of a job: the folder with these overrides, else the given folder if free, else the next number.

    The overrides are written at once, so that no other job takes the folder, and a job that dies early is in the table.
    """
    with FileLock(sweep / "sweep.lock"):
        run = _choose_folder(sweep, given, overrides)
        if not RunFolder(run).overrides.is_file():
            write_text(RunFolder(run).overrides, OmegaConf.to_yaml(list(overrides)))
    return run.absolute()


def _choose_folder(sweep: Path, given: Path, overrides: Sequence[str]) -> Path:
    for job in job_folders(sweep):
        if recorded_words(job) == set(overrides):
            if job.absolute() != given.absolute() and given.is_dir() and not any(given.iterdir()):
                given.rmdir()  # Hydra created it
            return job
    if not RunFolder(given).overrides.is_file():
        return given
    return sweep / str(max(int(job.name) for job in sweep.iterdir() if job.name.isdigit()) + 1)


def run_process(command: Sequence[str], sweep: str) -> tuple[int, str]:
    """Run a job and pass on its messages. Returns its exit code, and one line with its last message, for a failure.

    Raises:
        Terminated, KeyboardInterrupt: the sweep was asked to stop, and the job has saved; see `wait_for_process`.
    """
    last: deque[str] = deque(maxlen=20)
    child = subprocess.Popen(
        command, env=child_environment() | {"DISTILL_SWEEP": sweep}, stderr=subprocess.PIPE, text=True, errors="replace"
    )

    def pass_on() -> None:
        for line in child.stderr or ():
            sys.stderr.write(line)
            last.append(line.strip())

    with child:
        code = wait_for_process(child, pass_on)
    return code, _failure_reason(code, [line for line in last if line])


def _failure_reason(code: int, lines: Sequence[str]) -> str:
    messages = [line.removeprefix("distill: ") for line in lines if line.startswith("distill: ")]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (messages or [f"exit code {code}: {lines[-1]}" if lines else f"exit code {code}"])[-1]
