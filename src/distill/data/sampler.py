"""Which images form which batch, on which process, in which epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from distill.types import DistillError

SampleKey = tuple[int, int]
"""(epoch, index): all that a data set needs to make a sample, whichever worker is asked."""


class BatchSampler(Sampler[list[SampleKey]]):
    """Yields lists of keys (epoch, index); goes into ``DataLoader(batch_sampler=...)``.

    Training (``shuffle=True``): images are shuffled by (seed, epoch) alone and cut into batches of
    ``batch_size * world``, of which every process takes its share. So all processes have equally many batches, no image
    comes twice in an epoch, and two processes with half the batch see what one process sees.

    Evaluation (``shuffle=False``): every image exactly once, without padding. The same batches are formed whatever the
    number of processes and then dealt out whole, so that a batch, and with it each number computed from it, does
    not depend on that number.

    Args:
        groups: one hashable per image; a batch holds images of one group. In training what is left over in the groups
            is pooled into mixed batches at the end of the epoch; in evaluation it stays apart.
        batch_size: images per process and batch.
        shuffle: training or evaluation, as above.
        seed: of the shuffling.
        rank: this process, from 0.
        world: number of processes.
        drop_last: in training, leave out the last, incomplete batch, unless it is the epoch's only one.

    Raises:
        DistillError: fewer images than processes: one of them would have nothing to do, and the others wait for it.
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DistillError(f"A batch holds at least one image, got batch size {batch_size}. Set data.batch_size.")
        if len(groups) < world:
            raise DistillError(
                f"Expected at least one image per process, got {len(groups)} images for {world} processes. "
                "Use fewer devices, or raise data.limit, data.limit_eval or data.fraction if they cut the data."
            )
        self.groups, self.batch_size, self.shuffle, self.seed = groups, batch_size, shuffle, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> BatchSampler:
        """Itself: Lightning sets the epoch on ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Choose the epoch, counted from 0, and for a resume inside it the first batch to yield.

        The start survives a repeated call for the same epoch and is forgotten when another one begins.
        """
        if start is not None or epoch != self.epoch:
            self.start = start or 0
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this process in a whole epoch, whatever ``start`` is."""
        return len(self._training() if self.shuffle else self._evaluation())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """This process's batches of the current epoch."""
        epoch, batches = self.epoch, self._training() if self.shuffle else self._evaluation()
        for batch in batches[self.start :]:
            yield [(epoch, index) for index in batch]

    def _training(self) -> list[list[int]]:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed % 2**64, spawn_key=(self.epoch,)))
        order = rng.permutation(len(self.groups)).tolist()
        full = self.batch_size * self.world
        whole = len(order) // full * full
        batches: list[list[int]] = []
        mixed: list[int] = []
        # The rest is parted off before grouping: else a small group would be left out in every epoch.
        for members in self._by_group(order[:whole]):
            pure = len(members) // full * full
            batches += _chunk(members[:pure], full)
            mixed += members[pure:]
        batches += _chunk(mixed, full)
        rest = order[whole:]
        # A rest smaller than the number of processes would leave one of them without an image.
        if len(rest) >= self.world and not (self.drop_last and batches):
            batches.append(rest)
        return [batches[i][self.rank :: self.world] for i in rng.permutation(len(batches))]

    def _evaluation(self) -> list[list[int]]:
        size = min(self.batch_size, len(self.groups) // self.world)
        batches = [batch for members in self._by_group(range(len(self.groups))) for batch in _chunk(members, size)]
        return sorted(batches)[self.rank :: self.world]

    def _by_group(self, order: Sequence[int]) -> list[list[int]]:
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index in order:
            members[self.groups[index]].append(index)
        return list(members.values())


def _chunk(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
