"""Lightning's private state that callbacks read and change. Each use of it stands here, with the behavior that it rests on.

Written for Lightning 2.6; ``pyproject.toml`` bounds the version, and tests/contract/test_lightning_compat.py checks the behavior.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging


def data_module(trainer: L.Trainer) -> Any:
    """The data module that `fit` was given; Lightning sets the attribute without declaring it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """All callbacks; Lightning sets the attribute without declaring it."""
    result: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return result


def batch_progress(trainer: L.Trainer) -> Any:
    """Counts of training batches: ``current`` of this epoch, ``total`` of all, each with ready, started, processed and
    completed; and ``is_last_batch``. In `on_train_batch_end` the batch is processed and not yet completed.
    """
    return trainer.fit_loop.epoch_loop.batch_progress


def step_completed(trainer: L.Trainer) -> bool:
    """Whether the last batch was the last one of an optimizer step, whose gradients may be accumulated over batches."""
    progress = batch_progress(trainer)
    return bool(progress.is_last_batch or progress.current.processed % trainer.accumulate_grad_batches == 0)


def evaluation_follows(trainer: L.Trainer) -> bool:
    """Whether this epoch ends with an evaluation."""
    every = trainer.check_val_every_n_epoch
    return trainer.enable_validation and every is not None and (trainer.current_epoch + 1) % every == 0


def between_epochs(trainer: L.Trainer) -> bool:
    """Whether the last epoch that started has also ended."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    return bool(epoch.started == epoch.processed)


def start_epoch_anew(trainer: L.Trainer) -> None:
    """Let a run that resumes between two epochs begin the next one; with max_steps Lightning would end it at once."""
    trainer.fit_loop.epoch_loop.restarting = False


def correct_loop_state(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Correct the progress that a checkpoint of a callback's hook holds, so that a resume goes on at this very place.

    Saved after an epoch's last batch and before its evaluation, the checkpoint makes a resume begin with the evaluation.
    Saved at the end of an epoch, it counts the epoch as completed: Lightning does so after the hooks that save.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = batch_progress(trainer)
    unfinished = progress.current.completed < progress.current.processed
    if unfinished and progress.is_last_batch and evaluation_follows(trainer):
        # Lightning returns only to an evaluation that was interrupted in a batch, after a batch of training that was not.
        _complete(loops["epoch_loop.batch_progress"])
        evaluated = loops["epoch_loop.val_loop.batch_progress"]
        for count in (evaluated["total"], evaluated["current"]):
            count |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    if between_epochs(trainer):
        _complete(loops["epoch_progress"])


def _complete(progress: dict[str, Any]) -> None:
    for count in (progress["total"], progress["current"]):
        count["completed"] = count["processed"]


def leave_out_of_average(callback: EMAWeightAveraging, step: int) -> None:
    """Let the average pass over an optimizer step, by this batch, by later ones of the same step, and after a resume."""
    callback._latest_update_step = step
