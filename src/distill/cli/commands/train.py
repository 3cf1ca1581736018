"""The command train: compose, preflight, data, student and teacher, trainer, fit, report."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distill.cli.config import compose, override_checks
from distill.cli.config.hydra_main import answer_flags, parse_words, run_hydra
from distill.cli.reports import sweep_report
from distill.cli.runs import resume, sweep
from distill.cli.runs.run_lock import locked
from distill.cli.signals import Terminated
from distill.cli.startup import uncollected_imports
from distill.types import DistillError

if TYPE_CHECKING:
    import lightning as L

DEMO = ("experiment=demo", "ckpt_path=unfinished")
"""The words of a run without any word."""


def main(argv: Sequence[str]) -> int:
    """Train a run or a sweep. Without any word: the demo.

    Hydra's own flags work too: ``--help``, ``--cfg job --resolve``, ``-m``, ``-sc install=bash``.
    """
    argv = argv or DEMO
    compose.register_options()
    flags, options = parse_words(argv)
    cfg, overrides = override_checks.validate_overrides(flags.overrides)
    if not flags.runs:
        answer_flags([*overrides, *options])
    elif flags.multirun or cfg.hydra.mode == RunMode.MULTIRUN:
        _run_sweep(overrides, cfg)
    else:
        _run_once(resume.add_run_to_resume(overrides))
    return 0


def _run_sweep(words: Sequence[str], cfg: DictConfig) -> None:
    """Run a sweep, and print its table.

    Args:
        words: overrides of the sweep.
        cfg: the configuration of the first job, with the ``hydra`` node.

    Raises:
        JobFailed: at least one job failed, and the others are done.
        DistillError: see `sweep.choose_folder`.
        Terminated, KeyboardInterrupt: the sweep is asked to stop; the message says how to continue.
    """
    folder = sweep.choose_folder(words, cfg)
    try:
        sweep.run_jobs(folder, [(words, sweep.count_jobs(words, cfg))])
    except (Terminated, KeyboardInterrupt):
        sweep_report.show_jobs(folder)
        raise
    except DistillError:
        sweep_report.show_table(folder)
        raise
    sweep_report.show_table(folder)


def _run_once(overrides: Sequence[str]) -> None:
    refused: list[DistillError] = []

    def task(cfg: DictConfig) -> float:
        try:
            return train(cfg)
        except DistillError as error:  # bypasses Hydra, which would print all overrides before the message
            refused.append(error)
            return float("nan")

    run_hydra(overrides, task)
    if refused:
        raise refused[0]


def train(cfg: DictConfig) -> float:
    """Train one run. Returns the metric that the configuration names, for sweeps and tuners."""
    run = Path(HydraConfig.get().runtime.output_dir)
    try:
        return _train(cfg, run)
    except (Terminated, KeyboardInterrupt) as stopped:
        raise type(stopped)(resume.resume_advice(run)) from None


def _train(cfg: DictConfig, run: Path) -> float:
    with uncollected_imports():
        from distill.cli.reports import run_report, teacher_notice
        from distill.cli.runs import assembly, baseline, preflight

    started = time.monotonic()
    assembly.silence_known_warnings()
    plan = preflight.plan_run(cfg, run)
    trainer = assembly.build_trainer(plan)
    data, splits = preflight.load_data(plan)
    preflight.check_metrics(plan, data)
    with locked(plan.folder):
        run_report.write_config(plan)
        run_report.print_data(plan, data)
        alone = baseline.plan_baseline(plan, data, splits, trainer.world_size)
        teacher_notice.announce_teacher(plan, trainer, data)
        baseline.announce_baseline(alone)
        module = assembly.assemble(plan, data)
        compared = alone.result() if alone else None
        run_report.print_opening(plan, module)
        with translated_errors(trainer), run_report.open_loggers(plan, trainer):
            trainer.fit(module, data, ckpt_path=plan.checkpoint, weights_only=True)
            summary = run_report.finish_run(plan, trainer, module, data, splits, started, compared)
    return float(summary["student"][plan.metric])


@contextmanager
def translated_errors(trainer: L.Trainer) -> Iterator[None]:
    """Replace exceptions of Lightning and torch by those of the command line.

    Raises:
        Terminated, KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
        DistillError: an error whose own message does not name the cause.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        yield
    except (SIGTERMException, Terminated):
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the other processes, if only this one got the signal
        raise Terminated from None
    except SystemExit:  # raised by Lightning after an interrupt
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        raise explain(error, trainer.global_rank) from error
    except MisconfigurationException as error:  # for example a limit of batches that leaves none
        raise DistillError(f"trainer: {error}") from error


def explain(error: RuntimeError, rank: int) -> Exception:
    """A clear message for errors whose own message does not name the cause; other errors unchanged."""
    from distill.training.callbacks import consistency

    text = str(error)
    if consistency.is_lost_process(error):
        return DistillError(
            f"rank {rank}: another process of this run is gone or does not answer (it is waited for as long as "
            f"trainer.strategy.timeout says). Its own message says why: {text.splitlines()[0]}"
        )
    if "DataLoader worker" in text or "Pin memory thread" in text:
        return DistillError(
            f"a loader process died: {text.splitlines()[0]} Most often memory ran out: lower data.workers, "
            "data.prefetch or data.batch_size, or set data.workers=0 to see the cause. distill resume RUN continues "
            "from the last checkpoint"
        )
    if "loading state_dict" in text:
        return DistillError(f"resume: the checkpoint's weights do not fit this run's models: {text}")
    return error
