"""Random numbers of the augmentation: a pure function of (seed, epoch, image id) and of the purpose.

The numbers of workers and processes, the batch size and the order of loading do not change them. Every purpose has a
stream of its own, so that switching one augmentation on does not change the random numbers of another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """The use of a random stream."""

    BASE = 0
    """Size, flip and photometric distortion."""
    PARTNERS = 1
    """Whether there is a mosaic, and its other images."""
    LAYOUT = 2
    """The point at which the images of a mosaic meet."""
    ZOOM_OUT = 3
    IOU_CROP = 4
    SCALE_JITTER = 5
    OWN = 6
    """Transforms of the user."""


@dataclass(frozen=True)
class Streams:
    """The random streams of one image in one epoch, equal in every worker and process.

    Args:
        seed: seed of the data.
        epoch: index of the epoch, from 0.
        image_id: id of the image, a 64-bit integer.
    """

    seed: int
    epoch: int
    image_id: int

    def open(self, purpose: Purpose) -> np.random.Generator:
        """Return the stream of a purpose, from its start (Philox, counter-based)."""
        spawn_key = [number % 2**64 for number in (self.epoch, self.image_id)]
        entropy = [self.seed % 2**64, purpose.value] if purpose else self.seed % 2**64
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy, spawn_key=spawn_key)))


@contextmanager
def seed_globals(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of torch (CPU), NumPy and Python from a stream, and restore them at the end."""
    seeds = rng.integers(2**32, size=3).tolist()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seeds[0])  # torch.manual_seed would seed the GPUs as well
        np.random.seed(seeds[1])
        random.seed(seeds[2])
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
