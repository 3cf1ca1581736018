"""Length and learning rate of a training, chosen from the number of training images and the start weights."""

from __future__ import annotations

import math
from typing import NamedTuple

PASSES = 12
"""Epochs on a large data set: the 1x schedule of the COCO papers."""
LEAST_STEPS = 1000
"""Minimum number of batches of a training, counted for one process without accumulation."""
EVALUATIONS = 12
"""Evaluations of a run, about."""
RATE, TRAINED_RATE = 1e-3, 2e-4
"""Learning rates of AdamW: for a student with random heads, also on a pretrained backbone; for a trained student."""


class ScheduleChoice(NamedTuple):
    """Chosen values of the keys of ``schedule``."""

    epochs: int
    evaluate_every: int
    rate: float


def choose_schedule(images: int, batch: int, trained: bool = False, epochs: int | None = None) -> ScheduleChoice:
    """Choose the schedule for a number of training images.

    A run has 12 epochs, or more if these have fewer than 1000 batches. Batches of one process are counted: with more
    processes, or accumulated batches, the run sees as many images in fewer steps.

    Args:
        images: number of training images, at least 1.
        batch: images per step of one process.
        trained: whether all layers of the student start from trained weights.
        epochs: a given number of epochs; None chooses one.
    """
    steps = max(1, images // batch)  # per epoch, as with data.drop_last
    if epochs is None:
        epochs = max(PASSES, math.ceil(LEAST_STEPS / steps))
    return ScheduleChoice(epochs, max(1, round(epochs / EVALUATIONS)), TRAINED_RATE if trained else RATE)
