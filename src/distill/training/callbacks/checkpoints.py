"""Checkpoints from which a stopped run resumes with bitwise the same results as an uninterrupted run."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from distill.distributed import gather_objects
from distill.run_folder import BEST, LAST
from distill.training import lightning_compat as compat
from distill.types import DistillError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXCHANGE_STEPS = 10
"""With several processes: steps between two exchanges about whether to save or to stop."""


class RestoreSignalHandlers(L.Callback):
    """Restores the signal handlers that Lightning replaces in `fit`. Must be the first callback.

    Lightning's handler of SIGTERM waits for the other processes at any point, even while the teacher is evaluated.
    """

    def __init__(self) -> None:
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember the handlers before Lightning replaces them."""
        self._previous_handlers = _current_handlers()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the handlers."""
        _set_handlers(self._previous_handlers)


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt``: after each epoch, before each evaluation, and at an interval inside an epoch.

    A failed evaluation therefore loses no training. After SIGTERM or ctrl-C all processes finish the optimizer step,
    save and stop together; a second ctrl-C stops at once. Lightning itself would stop between two batches, possibly in
    the middle of an accumulated step, and its handlers would make the processes wait for one another at arbitrary
    points. In addition to Lightning's state, a checkpoint holds the random states of all processes, and whether the run
    was about to stop.

    Args:
        dirpath: folder of the checkpoints.
        every: interval inside an epoch: ``"500 steps"``, ``"10 minutes"`` or None.

    Raises:
        DistillError: ``every`` has another form.
    """

    def __init__(self, dirpath: str | Path, every: str | None = "10 minutes") -> None:
        self.file = Path(dirpath) / LAST
        self.steps, self.seconds = parse_interval(every)
        self._clock = time.monotonic()
        self._saved_batches = -1
        self._resume_state: dict[str, Any] = {}
        self._signal: int | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    # -- when to save

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch at the interval, and at the end of an epoch before an evaluation."""
        if compat.batch_progress(trainer).is_last_batch:
            # Without an evaluation the epoch has not ended here, and the run cannot stop here.
            if compat.evaluation_follows(trainer):
                self._save(trainer)
                self._stop_if_asked(trainer)
        elif compat.step_completed(trainer):
            # Not inside an accumulated step: a checkpoint holds neither its gradients nor the guard's records of it.
            if self._is_time(trainer):
                self._save(trainer)
            if _processes_exchange(trainer):
                self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the evaluation, with the best score."""
        self._save(trainer)
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop during an evaluation: the training was saved before.

        Several processes stop after the evaluation, because their numbers of batches may differ.
        """
        if trainer.world_size == 1 and trainer.state.fn == TrainerFn.FITTING:
            self._stop_if_asked(trainer)

    def _is_time(self, trainer: L.Trainer) -> bool:
        if self.steps:
            return trainer.global_step % self.steps == 0
        if not self.seconds or not _processes_exchange(trainer):
            return False
        return bool(trainer.strategy.broadcast(time.monotonic() - self._clock >= self.seconds))

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.file)
        self._clock = time.monotonic()
        self._saved_batches = compat.batch_progress(trainer).total.processed

    # -- stopping

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the signal handlers; after a failure Lightning restores them."""
        _set_handlers(self._previous_handlers)
        if self._signal is not None:  # a signal since the last check
            raise self._stop_exception()

    def _record_signal(self, number: int, frame: Any) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        """Save and stop on all processes, if any of them has received a signal."""
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return
        if self._saved_batches != compat.batch_progress(trainer).total.processed:
            self._save(trainer)
        raise self._stop_exception()

    def _stop_exception(self) -> BaseException:
        return KeyboardInterrupt() if self._signal == signal.SIGINT else SIGTERMException()

    # -- content of a checkpoint

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states, and correct Lightning's progress, in every checkpoint of the run."""
        checkpoint["resume"] = {
            "random": gather_objects(random_states()),
            "stop": trainer.should_stop,
        }
        compat.correct_loop_state(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until the first step."""
        self._resume_state = checkpoint.get("resume", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random states after everything that may draw: Lightning calls checkpoint callbacks last."""
        self._clock, self._signal = time.monotonic(), None
        self._previous_handlers = _current_handlers()
        _set_handlers(dict.fromkeys(STOP_SIGNALS, self._record_signal))
        state, self._resume_state = self._resume_state, {}
        if not state:
            return
        trainer.should_stop = state["stop"]
        if compat.between_epochs(trainer):
            compat.start_epoch_anew(trainer)
        if trainer.global_rank < len(state["random"]):
            set_random_states(state["random"][trainer.global_rank])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """If nothing is left to train, call the averages' `on_train_end`, which Lightning does not call."""
        if self._resume_state:
            for callback in compat.callbacks(trainer):
                if isinstance(callback, WeightAveraging):
                    callback.on_train_end(trainer, pl_module)


class BestCheckpoint(ModelCheckpoint):
    """Writes ``best.ckpt``. The best score is kept if the run resumes in another folder, or after its folder was moved.

    Args:
        dirpath: folder of the checkpoints.
        monitor: name of the value that chooses the best checkpoint.
        mode: ``max`` or ``min``.
    """

    def __init__(self, dirpath: str | Path, monitor: str, mode: str = "max") -> None:
        super().__init__(
            dirpath, Path(BEST).stem, monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score together with its file, also if the file was moved with the run's folder."""
        if not state_dict["best_model_path"]:
            return
        there = Path(state_dict["best_model_path"])
        here = Path(str(self.dirpath)) / there.name
        file = next((str(place) for place in (here, there) if place.is_file()), None)
        if file is None:
            warnings.warn(
                f"the best checkpoint so far, {there}, is gone. The best checkpoint is chosen from the epochs that "
                "follow",
                stacklevel=2,
            )
            return
        known = {file: state_dict["best_model_score"]}
        super().load_state_dict(
            state_dict
            | {"dirpath": self.dirpath, "best_model_path": file, "kth_best_model_path": file, "best_k_models": known}
        )


def parse_interval(every: str | None) -> tuple[int, float]:
    """(steps, seconds) of ``"500 steps"``, ``"10 minutes"`` or None; 0 means never.

    Raises:
        DistillError: the text has another form.
    """
    if every is None:
        return 0, 0.0
    match = re.fullmatch(r"(\d+) steps?|(\d+(?:\.\d+)?) minutes?", str(every).strip())
    steps, seconds = (int(match[1] or 0), 60 * float(match[2] or 0)) if match else (0, 0.0)
    if not steps and not seconds:
        raise DistillError(f"save_every: expected '500 steps', '10 minutes' or null, got '{every}'")
    return steps, seconds


def random_states() -> dict[str, Any]:
    """States of all global generators of this process, in plain containers and tensors."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    numpy = {**numpy, "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def set_random_states(states: dict[str, Any]) -> None:
    """Set the states of `random_states`. Generators of missing devices are ignored."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = states["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    random.setstate(states["python"])


def _current_handlers() -> dict[signal.Signals, Any]:
    """The current handlers of the signals that stop a run."""
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Set signal handlers. Only the main thread may do so."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _processes_exchange(trainer: L.Trainer) -> bool:
    """Whether the processes exchange their state after this step; a single process always checks."""
    return trainer.world_size == 1 or trainer.global_step % EXCHANGE_STEPS == 0
