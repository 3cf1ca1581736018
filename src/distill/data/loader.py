"""The data loader: it resumes at any batch of an epoch, and its processes survive the signals that stop a run."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from distill.data.images import ImageDataset
from distill.data.sampler import SampleKey
from distill.data.transforms import Sample
from distill.types import Batch, DistillError

SIGTERM_GRACE = 600
"""Seconds that a loader process lives on after SIGTERM. When the run itself ends, the process ends at once."""
LOADER_PROCESSES: weakref.WeakSet[Any] = weakref.WeakSet()
"""The processes of all loaders that this process started."""


class BatchDataset(Dataset[Batch]):
    """Batches as a data set, for Lightning's ``Trainer.predict``, which replaces all other batch samplers.

    Args:
        images: the images.
        batches: the keys of each batch.
        collate: makes a batch of samples.
    """

    def __init__(
        self, images: ImageDataset, batches: Sequence[Sequence[SampleKey]], collate: Callable[[list[Sample]], Batch]
    ) -> None:
        self.images, self.batches, self.collate = images, batches, collate

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.collate([self.images[key] for key in self.batches[index]])


class DetectionLoader(DataLoader[Sample]):
    """Loads batches of samples.

    An iterator starts its workers when the first batch is requested, at the epoch and batch that ``position`` returns
    then. Lightning creates the training loader and its iterator before it restores the progress of a resumed run.
    Workers started at that point would load the first images of the first epoch.

    Args:
        dataset: the images.
        position: returns (epoch, number of batches of it that were already used); None: every iterator starts at the
            first batch.
        options: options of ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self, dataset: Dataset[Sample], position: Callable[[], tuple[int, int]] | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, **{"worker_init_fn": _outlive_stop_signals, **options})
        self.position = position
        self._processes: list[Any] = []

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches from the current position to the end of the epoch.

        Raises:
            DistillError: an image or a transform of the user is invalid.
            RuntimeError: a process of the loader died. Torch itself may report only a broken connection.
        """
        if self.position is not None:
            sampler: Any = self.batch_sampler
            sampler.set_epoch(*self.position())
        processes_before = multiprocessing.active_children()
        batches = super().__iter__()
        started = [process for process in multiprocessing.active_children() if process not in processes_before]
        LOADER_PROCESSES.update(started)
        self._processes = started or self._processes  # persistent workers are not started again
        try:
            yield from batches
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if all(process.is_alive() for process in self._processes):
                raise
            raise RuntimeError(f"a DataLoader worker died: {error}.") from error
        except DistillError as error:
            # Torch puts the worker's traceback into the message.
            raise DistillError(str(error).rpartition("distill.types.DistillError: ")[2].rstrip()) from error

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state. Lightning resumes inside an epoch only with loaders that have this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the empty state of `state_dict`."""


def _outlive_stop_signals(worker: int) -> None:
    """Let a loader process survive the signals that stop a run.

    SLURM, terminals and process groups signal every process. The current step still needs its batch. The run stops its
    loaders when that step is done, within `SIGTERM_GRACE`.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_GRACE) and None)


@atexit.register
def _kill_loader_processes() -> None:
    """Kill the loader processes that are alive when the run exits. multiprocessing would send SIGTERM and wait."""
    for process in multiprocessing.active_children():
        if process in LOADER_PROCESSES:
            process.kill()
