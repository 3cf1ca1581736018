"""Access to Lightning's private state that callbacks read and change.

All uses of private state are in this file, with the behavior of Lightning on which they depend. The file is written for
Lightning 2.6. ``pyproject.toml`` bounds the version, and tests/contract/test_lightning_compat.py checks the behavior.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging

from distill.types import DistillError


def apply_schedule(trainer: L.Trainer, **values: Any) -> None:
    """Set options of the trainer that the schedule decides, where the trainer has Lightning's defaults.

    Args:
        trainer: the trainer.
        values: name of the trainer's option -> value of the schedule.

    Raises:
        DistillError: trainer and schedule have different values, both other than the default.
    """
    for name, default in {
        "gradient_clip_val": None,
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
    }.items():
        value, given = values[name], getattr(trainer, name)
        if value in (default, given):
            continue
        if given != default:
            raise DistillError(f"{name}: the trainer has {given}, the schedule {value}. Set one of them only")
        setattr(trainer, name, value)


def data_module(trainer: L.Trainer) -> Any:
    """The data module that `fit` was given; Lightning sets the attribute without declaring it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """All callbacks; Lightning sets the attribute without declaring it."""
    result: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return result


def batch_progress(trainer: L.Trainer) -> Any:
    """Counts of training batches: ``current`` in this epoch, ``total`` in the run; and ``is_last_batch``.

    Both have the counts ready, started, processed and completed. In `on_train_batch_end` the batch is processed and not
    yet completed.
    """
    return trainer.fit_loop.epoch_loop.batch_progress


def step_completed(trainer: L.Trainer) -> bool:
    """Whether the last batch completed an optimizer step. A step may accumulate gradients over several batches."""
    progress = batch_progress(trainer)
    return bool(progress.is_last_batch or progress.current.processed % trainer.accumulate_grad_batches == 0)


def evaluation_follows(trainer: L.Trainer) -> bool:
    """Whether this epoch ends with an evaluation."""
    every = trainer.check_val_every_n_epoch
    return trainer.enable_validation and every is not None and (trainer.current_epoch + 1) % every == 0


def evaluates_part(trainer: L.Trainer) -> bool:
    """Whether an evaluation may leave out images of the split. The sanity check before the training does so too."""
    limit = trainer.limit_val_batches
    return trainer.sanity_checking or isinstance(limit, int) or limit < 1.0


def evaluate_last_epoch(trainer: L.Trainer) -> None:
    """Let the last epoch end with an evaluation, whatever the interval between evaluations is."""
    if trainer.current_epoch + 1 == trainer.max_epochs:
        trainer.check_val_every_n_epoch = 1


def end_after_this_step(trainer: L.Trainer) -> bool:
    """Write the values of the last step to the loggers. If the run ends inside an epoch, evaluate the weights.

    Call this in the module's `on_train_batch_end`: Lightning afterwards decides whether to write and to evaluate. A run
    that ends inside its first epoch is not evaluated, because there is no other evaluation to compare with.

    Returns:
        whether this call has set ``should_stop``, without which Lightning evaluates at the end of an epoch only. The
        evaluation has to reset the value: a checkpoint would store it, and a resume with more steps would stop.
    """
    if trainer.log_every_n_steps:  # type: ignore[attr-defined]
        trainer.log_every_n_steps = 1  # type: ignore[attr-defined]
    if trainer.current_epoch > 0 and not batch_progress(trainer).is_last_batch:
        trainer.check_val_every_n_epoch = 1
        stopped, trainer.should_stop = trainer.should_stop, True
        return not stopped and trainer.enable_validation
    return False


def between_epochs(trainer: L.Trainer) -> bool:
    """Whether the last epoch that started has also ended."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    return bool(epoch.started == epoch.processed)


def start_epoch_anew(trainer: L.Trainer) -> None:
    """Let a run that resumes between two epochs start the next epoch. With max_steps Lightning would end the run."""
    trainer.fit_loop.epoch_loop.restarting = False


def correct_loop_state(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Correct the progress in a checkpoint that a callback's hook saves, so that a resume continues at the same place.

    A checkpoint saved after an epoch's last batch and before its evaluation makes a resume begin with the evaluation. A
    checkpoint saved at the end of an epoch counts the epoch as completed: Lightning counts it only after the hooks that
    save.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = batch_progress(trainer)
    unfinished = progress.current.completed < progress.current.processed
    if unfinished and progress.is_last_batch and evaluation_follows(trainer):
        # Lightning resumes an evaluation only if it was interrupted in a batch, and the training batch was completed.
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
    """Exclude an optimizer step from the average: in this batch, in later batches of the step, and after a resume."""
    callback._latest_update_step = step
