"""The assignment of images to batches and processes in each epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from distill.types import DistillError

SampleKey = tuple[int, int]
"""(epoch, index): determines a sample completely, whichever worker makes it."""


class BatchSampler(Sampler[list[SampleKey]]):
    """Yields batches as lists of keys (epoch, index), for ``DataLoader(batch_sampler=...)``.

    Training (``shuffle=True``): (seed, epoch) alone determines the order of the images. The order is cut into batches
    of ``batch_size * world``, and every process takes its part of each. So all processes have the same number of
    batches, no image occurs twice in an epoch, and two processes with half the batch size see the batches of one
    process.

    Evaluation (``shuffle=False``): every image occurs exactly once, without padding. Whole batches are dealt out to the
    processes, and their content does not depend on the number of processes. Numbers computed per batch do not either.

    Args:
        groups: one hashable value per image. A batch holds images of one group. In training the images left over in the
            groups form mixed batches. In evaluation they form smaller batches of their own.
        batch_size: images per process and batch.
        shuffle: whether batches are for training, see above.
        seed: seed of the shuffling.
        rank: index of this process, from 0.
        world: number of processes.
        drop_last: in training, leave out the last, incomplete batch, unless the epoch has no other.

    Raises:
        DistillError: the batch size is below 1, or there are fewer images than processes. In that case one process
            would have no batch, and the others would wait for it.
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
            raise DistillError(f"Expected a batch size of at least 1, got {batch_size}. Set data.batch_size.")
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
        """This object: Lightning sets the epoch on ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Set the epoch and the first batch to yield.

        Args:
            epoch: index of the epoch, from 0.
            start: index of the first batch, for a resume inside an epoch. None keeps the current start for the same
                epoch, and starts at 0 for another epoch.
        """
        if start is not None or epoch != self.epoch:
            self.start = start or 0
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches of this process in a whole epoch. ``start`` does not change it."""
        return len(self._training_batches() if self.shuffle else self._evaluation_batches())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield this process's batches of the current epoch."""
        epoch, batches = self.epoch, self._training_batches() if self.shuffle else self._evaluation_batches()
        for batch in batches[self.start :]:
            yield [(epoch, index) for index in batch]

    def _training_batches(self) -> list[list[int]]:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed % 2**64, spawn_key=(self.epoch,)))
        order = rng.permutation(len(self.groups)).tolist()
        total_batch = self.batch_size * self.world
        complete = len(order) // total_batch * total_batch
        batches: list[list[int]] = []
        mixed: list[int] = []
        # The incomplete batch is taken off before grouping. Otherwise a small group would be left out in every epoch.
        for members in self._by_group(order[:complete]):
            pure = len(members) // total_batch * total_batch
            batches += _chunk(members[:pure], total_batch)
            mixed += members[pure:]
        batches += _chunk(mixed, total_batch)
        incomplete = order[complete:]
        # With fewer images than processes, one process would have no image.
        if len(incomplete) >= self.world and not (self.drop_last and batches):
            batches.append(incomplete)
        return [batches[i][self.rank :: self.world] for i in rng.permutation(len(batches))]

    def _evaluation_batches(self) -> list[list[int]]:
        size = min(self.batch_size, len(self.groups) // self.world)
        batches = [batch for members in self._by_group(range(len(self.groups))) for batch in _chunk(members, size)]
        return sorted(batches)[self.rank :: self.world]

    def _by_group(self, order: Sequence[int]) -> list[list[int]]:
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index in order:
            members[self.groups[index]].append(index)
        return list(members.values())


class JointBatchSampler(BatchSampler):
    """Yields the batches of labeled images, each with the keys of images without labels after its own.

    The labeled batches are those of `BatchSampler`, in number and content. The other images are an endless stream of
    whole batches: pass 0 over all of them in random order, then pass 1, and so on. A step takes the next batch of this
    stream. Which batch this is depends on the epoch and the step alone, so a resumed run continues the stream.

    Args:
        labeled: the sampler of the labeled images.
        groups: one hashable value per image without labels, as in `BatchSampler`.
        batch_size: images without labels per process and step.

    Raises:
        DistillError: there are fewer images without labels than processes.
    """

    def __init__(self, labeled: BatchSampler, groups: Sequence[Hashable], batch_size: int) -> None:
        place = (labeled.rank, labeled.world)
        super().__init__(labeled.groups, labeled.batch_size, True, labeled.seed, *place, labeled.drop_last)
        if len(groups) < labeled.world:
            raise DistillError(
                f"data.unlabeled: expected at least one image per process, got {len(groups)} images for "
                f"{labeled.world} processes. Use fewer devices, or a folder with more images"
            )
        # Another seed: with as many images of both kinds, both orders would be equal.
        self.stream = BatchSampler(groups, batch_size, True, labeled.seed + 1, *place, drop_last=True)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield this process's batches of the current epoch. Indices from ``len(self.groups)`` on are unlabeled."""
        epoch, first, steps, per_pass = self.epoch, self.start, len(self), len(self.stream)
        known, batches = -1, list[list[SampleKey]]()
        for step, keys in enumerate(super().__iter__(), start=first):
            number, place = divmod(epoch * steps + step, per_pass)
            if number != known:
                self.stream.set_epoch(number, 0)
                known, batches = number, list(self.stream)
            yield [*keys, *((epoch, len(self.groups) + index) for _, index in batches[place])]


def _chunk(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
