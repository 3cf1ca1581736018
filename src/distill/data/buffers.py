"""Reuse of the memory that holds batches.

The operating system clears new memory page by page on the first write, and shared memory most slowly. That took a
quarter of a worker's time per image. Each process therefore reuses a few buffers. The last byte of a buffer is its
mark: 1 while a batch uses the buffer. `BufferPool.acquire` sets the mark. The mark is cleared when the last tensor on
the batch's memory is freed, in whichever process reads the batch. The buffer of a batch that is kept, or lost on its
way, is never reused.
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
"""Buffers per process: enough for the batches that a worker prefetches, the current step, and Lightning's prefetch."""


class BufferPool:
    """The buffers of one process. A worker shares its buffers with the process that it loads for.

    Args:
        most: number of buffers that the pool keeps. With more at once it forgets the oldest, which are freed together
            with their batches.
    """

    def __init__(self, most: int = MAX_BUFFERS) -> None:
        self._buffers: deque[Tensor] = deque(maxlen=most)

    @torch.inference_mode(False)  # training could not set a mark that was created in inference mode
    def acquire(self, count: int, shared: bool) -> Tensor:
        """Return a free uint8 buffer of at least ``count`` bytes plus the mark, which is set.

        Args:
            count: bytes that the batch needs.
            shared: whether the buffer lies in shared memory.
        """
        in_use: list[Tensor] = []
        buffer = None
        while buffer is None and self._buffers:
            candidate = self._buffers.popleft()  # no other thread can acquire the buffer meanwhile
            if candidate.is_shared() != shared:  # type: ignore[no-untyped-call]
                continue  # inherited from the process that this process was forked from
            if candidate[-1]:
                in_use.append(candidate)
            elif len(candidate) > count:  # smaller buffers are dropped, so the remaining ones fit the largest batch
                buffer = candidate
        if buffer is None:
            created = torch.empty(count + 1, dtype=torch.uint8)
            buffer = created.share_memory_() if shared else created  # type: ignore[no-untyped-call]
        buffer[-1] = 1
        self._buffers.extend([*in_use, buffer])
        return buffer


def wrap_images(buffer: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return the start of a buffer as images (B, 3, H, W). Freeing the images clears the buffer's mark.

    Args:
        buffer: a buffer of `BufferPool.acquire`. Its content is not changed.
        shape: (B, H, W, 3), the layout in memory.
    """
    pixels = buffer.numpy()
    view = pixels[: math.prod(shape)]  # only the storage of the returned tensor holds a reference to this array
    weakref.finalize(view, _clear_mark, pixels[-1:], os.getpid()).atexit = False
    return torch.from_numpy(view).view(shape).permute(0, 3, 1, 2)


def _clear_mark(mark: Any, process: int) -> None:
    if os.getpid() == process:  # a forked copy of the process does not own the batch
        mark[0] = 0


@dataclass(frozen=True)
class WorkerBatch(Batch):
    """A batch in a worker. Unpickling it in another process gives an ordinary `Batch` on the same memory."""

    buffer: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        count, channels, height, width = self.images.shape
        shape = (count, height, width, channels)
        parts = (self.sizes, self.original_sizes, self.targets, self.ids, self.unlabeled)
        return _rebuild_batch, (self.buffer, shape, *parts)


def _rebuild_batch(
    buffer: Tensor,
    shape: tuple[int, int, int, int],
    sizes: tuple[Size, ...],
    original_sizes: tuple[Size, ...],
    targets: tuple[Target, ...],
    ids: tuple[int, ...],
    unlabeled: Batch | None,
) -> Batch:
    return Batch(wrap_images(buffer, shape), sizes, original_sizes, targets, ids, unlabeled=unlabeled)
