"""Memory for batches, filled again as soon as nobody holds what was in it.

The system clears fresh memory page by page when it is first written, shared memory most slowly of all: of a worker's time
per image that was a quarter. So each process fills the same few pieces again. The last byte of a piece says that a batch
lies in it: `BufferPool.take` sets it, and the end of the last tensor on that batch's memory, in whichever process reads it, clears
it. A batch that is held, or lost on its way, is a piece that never comes back.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.types import Batch, Size, Target

MAX_BUFFERS = 4
"""Pieces that a process knows of: what a worker prepares ahead, and what the step and Lightning's look ahead hold."""


class BufferPool:
    """The pieces of a process; those of a worker are shared with the process that it works for.

    Args:
        most: pieces that are known; of more at once, the oldest are forgotten, and go when their batches do.
    """

    def __init__(self, most: int = MAX_BUFFERS) -> None:
        self._pieces: deque[Tensor] = deque(maxlen=most)

    @torch.inference_mode(False)  # else a mark that evaluation made could not be set by training
    def acquire(self, count: int, shared: bool) -> Tensor:
        """A piece, uint8, with room for ``count`` bytes and its mark, which is set."""
        held: list[Tensor] = []
        piece = None
        while piece is None and self._pieces:
            known = self._pieces.popleft()  # so that no other thread can take it
            if known.is_shared() != shared:  # type: ignore[no-untyped-call]
                continue  # of the process that this one was forked from
            if known[-1]:
                held.append(known)
            elif len(known) > count:  # a smaller one goes: those that stay fit the largest batch
                piece = known
        if piece is None:
            fresh = torch.empty(count + 1, dtype=torch.uint8)
            piece = fresh.share_memory_() if shared else fresh  # type: ignore[no-untyped-call]
        piece[-1] = 1
        self._pieces.extend([*held, piece])
        return piece


def wrap_images(piece: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Images (B, 3, H, W) of ``shape`` (B, H, W, 3), whatever lies there: their end gives the piece back."""
    pixels = piece.numpy()
    part = pixels[: math.prod(shape)]  # kept by the storage that torch makes of it, and by nothing else
    weakref.finalize(part, _release, pixels[-1:], os.getpid()).atexit = False
    return torch.from_numpy(part).view(shape).permute(0, 3, 1, 2)


def _release(mark: Any, process: int) -> None:
    if os.getpid() == process:  # a fork of it holds nothing
        mark[0] = 0


@dataclass(frozen=True)
class WorkerBatch(Batch):
    """A worker's batch, which arrives as a `Batch` of its own on the same memory."""

    piece: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        count, channels, height, width = self.images.shape
        shape = (count, height, width, channels)
        return _rebuild_batch, (self.piece, shape, self.sizes, self.original_sizes, self.targets, self.ids)


def _rebuild_batch(
    piece: Tensor,
    shape: tuple[int, int, int, int],
    sizes: tuple[Size, ...],
    original_sizes: tuple[Size, ...],
    targets: tuple[Target, ...],
    ids: tuple[int, ...],
) -> Batch:
    return Batch(wrap_images(piece, shape), sizes, original_sizes, targets, ids)
