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
SCRATCH_RATE, PRETRAINED_RATE = 1e-3, 2e-4
"""Learning rates of AdamW for random weights, and for a backbone or detector that is already trained."""


class ScheduleChoice(NamedTuple):
    """Chosen values of the keys of ``schedule``."""

    epochs: int
    evaluate_every: int
    rate: float


def choose_schedule(images: int, batch: int, pretrained: bool, epochs: int | None = None) -> ScheduleChoice:
    """Choose the schedule for a number of training images.

    A run has 12 epochs, or more if these have fewer than 1000 batches. Batches of one process are counted: with more
    processes, or accumulated batches, the run sees as many images in fewer steps.

    Args:
        images: number of training images, at least 1.
        batch: images per step of one process.
        pretrained: whether the student's backbone, or the whole student, starts from trained weights.
        epochs: a given number of epochs; None chooses one.
    """
    steps = max(1, images // batch)  # per epoch, as with data.drop_last
    if epochs is None:
        epochs = max(PASSES, math.ceil(LEAST_STEPS / steps))
    rate = PRETRAINED_RATE if pretrained else SCRATCH_RATE
    return ScheduleChoice(epochs, max(1, round(epochs / EVALUATIONS)), rate)
