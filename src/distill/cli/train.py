"""The verb train: compose, preflight, data, student and teacher, trainer, fit, report."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli import compose, resume, sweep
from distill.cli.presets import register_presets
from distill.cli.signals import Terminated
from distill.types import DistillError

if TYPE_CHECKING:
    import lightning as L


def main(argv: Sequence[str]) -> int:
    """Hydra's own flags work too: ``--help``, ``--cfg job --resolve``, ``-m``, ``-sc install=bash``."""
    from hydra._internal.utils import _run_hydra, get_args_parser

    compose.register_resolvers()
    register_presets(compose.folder())
    parser = get_args_parser()
    args = parser.parse_args(list(argv))
    compose.check_flags(args)
    if not args.shell_completion:
        compose.check(args.overrides)
    if not args.multirun:
        args.overrides = resume.resumed(args.overrides)
    elif any(word.startswith("ckpt_path=") for word in args.overrides):
        raise DistillError("ckpt_path with -m: a sweep goes on by itself where it stopped: hydra.sweep.dir=DIR")
    else:
        args.overrides = resume.swept(args.overrides)
    # Hydra prints and exits by itself unless this is set; the messages are ours, one level up.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    home, jobs = str(compose.folder()), sweep.Jobs()
    refused: list[DistillError] = []

    def task(cfg: DictConfig) -> float:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return jobs.run(cfg)
        try:
            return train(cfg)
        except DistillError as error:  # past Hydra, which would print all overrides in front of it
            refused.append(error)
            return float("nan")

    try:
        _run_hydra(args, parser, task_function=task, config_path=home, config_name=compose.NAME)
    except (HydraException, OmegaConfBaseException) as error:
        missing = '; its sweeper is an extra: install "distill[optuna]"' if "sweeper/optuna" in str(error) else ""
        told = str(error).partition("Config search path")[0].strip()
        raise DistillError(f"{told}{missing}") from error
    except sweep.JobFailed as error:
        raise DistillError(f"{len(jobs.failed)} of the sweep's jobs failed, the first: {error}") from None
    except (Terminated, KeyboardInterrupt) as stopped:
        raise type(stopped)(*(stopped.args or jobs.going_on())) from None
    finally:
        jobs.show()
    if refused:
        raise refused[0]
    return 0


def train(cfg: DictConfig) -> float:
    """One run. Returns the metric that the configuration names, for sweeps and tuners."""
    run = Path(HydraConfig.get().runtime.output_dir)
    try:
        return _train(cfg, run)
    except (Terminated, KeyboardInterrupt) as stopped:
        raise type(stopped)(resume.going_on(run)) from None


def _train(cfg: DictConfig, run: Path) -> float:
    from distill.cli import assembly, preflight, report

    started = time.monotonic()
    silence_known_warnings()
    plan = preflight.plan_run(cfg, run)
    trainer = assembly.build_trainer(plan)
    data, splits = preflight.load_data(plan)
    preflight.check_metrics(plan, data)
    report.write_config(plan)
    module = assembly.assemble(plan, data)
    report.print_opening(plan, module, data)
    with translated_errors(trainer), report.open_loggers(plan, trainer):
        trainer.fit(module, data, ckpt_path=plan.checkpoint, weights_only=True)
        summary = report.finish_run(plan, trainer, module, data, splits, started)
    return float(summary["student"][plan.metric])


@contextmanager
def translated_errors(trainer: L.Trainer) -> Iterator[None]:
    """Replace exceptions of Lightning and torch by those of the command line.

    Raises:
        Terminated, KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
        DistillError: an error whose own message does not tell the cause.
    """
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


def explain(error: RuntimeError, rank: int) -> Exception:
    """A clear message for errors whose own message does not tell the cause; other errors unchanged."""
    from distill.training.callbacks import consistency

    text = str(error)
    if consistency.lost(error):
        return DistillError(
            f"rank {rank}: another process of this run is gone or does not answer (it is waited for as long as "
            f"trainer.strategy.timeout says). Its own message says why: {text.splitlines()[0]}"
        )
    if "DataLoader worker" in text or "Pin memory thread" in text:
        return DistillError(
            f"a loader process died: {text.splitlines()[0]} Most often memory ran out: lower data.workers, data.prefetch or "
            "data.batch_size, or set data.workers=0 to see the cause. ckpt_path=last goes on from the last checkpoint"
        )
    if "loading state_dict" in text:
        return DistillError(f"resume: the checkpoint's weights do not fit this run's models: {text}")
    return error


def silence_known_warnings() -> None:
    """Silence messages of Lightning that appear in every run and need no action."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    known = (
        "treespec, LeafSpec",
        "is not empty",
        "smaller than the logging interval",
        "have many workers",
        "broadcast_buffers. is deprecated",  # its successor does not exist in the oldest torch that we support
        "could not find the monitored key",  # schedule.steps may end inside an epoch, before the first evaluation
        "recommended to use .self.log",  # our metrics are equal on all ranks already
    )
    for words in known:
        warnings.filterwarnings("ignore", f".*{words}.*")
