"""What a run needs to go on, to the same bits, as if it had never been stopped."""

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

from distill.distributed import gather
from distill.run_folder import BEST, LAST
from distill.training import lightning_compat as compat
from distill.types import DistillError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXCHANGE_STEPS = 10
"""Steps from one exchange between several processes to the next, on whether it is time to save, or to leave."""


class RestoreSignalHandlers(L.Callback):
    """Keeps Lightning from hearing of signals: whoever heard of them before `fit` does again. To be the first callback.

    Lightning's handler of SIGTERM waits for the other processes wherever this one is, in the teacher's evaluation too.
    """

    def __init__(self) -> None:
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before Lightning begins to listen."""
        self._previous_handlers = _current_handlers()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Just after it did."""
        _set_handlers(self._previous_handlers)


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt``: after each epoch, before each evaluation, and every so often inside an epoch.

    An evaluation that fails thus costs no training. SIGTERM and ctrl-C wait for the end of an optimiser step, where all
    processes save and leave together; a second ctrl-C does not wait. Lightning's own way would leave between two batches, which
    may be the middle of an accumulated step, and lets processes wait for one another in a handler, wherever each of them is.
    Beside what Lightning keeps, a checkpoint holds the random states of all processes, and whether the run was to stop.

    Args:
        dirpath: folder of the checkpoints.
        every: also inside an epoch: ``"500 steps"``, ``"10 minutes"`` or None.

    Raises:
        DistillError: ``every`` is none of these.
    """

    def __init__(self, dirpath: str | Path, every: str | None = "10 minutes") -> None:
        self.file = Path(dirpath) / LAST
        self.steps, self.seconds = parse_interval(every)
        self._clock = time.monotonic()
        self._saved_batches = -1
        self._resume_state: dict[str, Any] = {}
        self._signal: int | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    # -- when

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inside an epoch where it is time, at its end where an evaluation follows."""
        if compat.batch_progress(trainer).is_last_batch:
            # An epoch without an evaluation is not at its end here, and cannot be left.
            if compat.evaluation_follows(trainer):
                self._save(trainer)
                self._stop_if_asked(trainer)
        elif compat.step_completed(trainer):
            # Not amid an accumulated step, of which nothing keeps the gradients, or what the guard has seen of it.
            if self._is_time(trainer):
                self._save(trainer)
            if _processes_exchange(trainer):
                self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the evaluation, with its best score."""
        self._save(trainer)
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """What was trained lies on the disk: an evaluation need not keep anyone waiting who wants to stop.

        Several processes, which need not have as many batches each, leave after it.
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

    # -- when asked to stop

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand the signals back; after a failure Lightning does."""
        _set_handlers(self._previous_handlers)
        if self._signal is not None:  # since the last look
            raise self._stop_exception()

    def _record_signal(self, number: int, frame: Any) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        """Save and leave, on all processes or on none, if any of them was asked."""
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return
        if self._saved_batches != compat.batch_progress(trainer).total.processed:
            self._save(trainer)
        raise self._stop_exception()

    def _stop_exception(self) -> BaseException:
        return KeyboardInterrupt() if self._signal == signal.SIGINT else SIGTERMException()

    # -- what

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out, to any checkpoint of the run."""
        checkpoint["resume"] = {
            "random": gather(random_states()),
            "stop": trainer.should_stop,
        }
        compat.correct_loop_state(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until the first step."""
        self._resume_state = checkpoint.get("resume", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put it back, after all that may have drawn: callbacks that write checkpoints are called last."""
        self._clock, self._signal = time.monotonic(), None
        self._previous_handlers = _current_handlers()
        _set_handlers(dict.fromkeys(STOP_SIGNALS, self._record_signal))
        found, self._resume_state = self._resume_state, {}
        if not found:
            return
        trainer.should_stop = found["stop"]
        if compat.between_epochs(trainer):
            compat.start_epoch_anew(trainer)
        if trainer.global_rank < len(found["random"]):
            set_random_states(found["random"][trainer.global_rank])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where nothing was left to train, nobody has said that the training ended: averages wait for it."""
        if self._resume_state:
            for callback in compat.callbacks(trainer):
                if isinstance(callback, WeightAveraging):
                    callback.on_train_end(trainer, pl_module)


class BestCheckpoint(ModelCheckpoint):
    """Writes ``best.ckpt``. Its score survives a resume in another folder, or of a folder that was moved.

    Args:
        dirpath: folder of the checkpoints.
        monitor: name of the value that decides.
        mode: ``max`` or ``min``.
    """

    def __init__(self, dirpath: str | Path, monitor: str, mode: str = "max") -> None:
        super().__init__(
            dirpath, Path(BEST).stem, monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the score with the file that has it, wherever that lies now."""
        if not state_dict["best_model_path"]:
            return
        there = Path(state_dict["best_model_path"])
        here = Path(str(self.dirpath)) / there.name
        file = next((str(each) for each in (here, there) if each.is_file()), None)
        if file is None:
            warnings.warn(
                f"the best checkpoint so far, {there}, is gone: the best of what follows counts", stacklevel=2
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
        DistillError: it is none of these.
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
    """The reverse of `random_states`; generators of devices that are not there are left out."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = states["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    random.setstate(states["python"])


def _current_handlers() -> dict[signal.Signals, Any]:
    """Who hears of the signals that stop a run."""
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Only the main thread may say who hears of signals."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _processes_exchange(trainer: L.Trainer) -> bool:
    """Whether the processes talk after this step; one alone has nobody to wait for."""
    return trainer.world_size == 1 or trainer.global_step % EXCHANGE_STEPS == 0
