"""The loader, whose processes see a run to its end, and a resume's first batch."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from distill.data.images import ImageDataset
from distill.data.transforms import Sample

SIGTERM_GRACE = 600
"""Seconds that a loader's process lives on after SIGTERM; a run that is gone ends it at once."""
LOADER_PROCESSES: weakref.WeakSet[Any] = weakref.WeakSet()
"""Processes of this process's loaders."""


class DetectionLoader(DataLoader[Sample]):
    """Batches of samples. A training loader starts when its first one is asked for, at the epoch and batch where the run is then.

    Lightning makes the training loader, and its iterator, before it restores the counts of a resume; workers that started
    at once would bring the first images of the first epoch.

    Args:
        position: gives (epoch, batches already seen in it); None: every pass begins at the first.
        options: see torch's own.
    """

    def __init__(
        self, dataset: ImageDataset, position: Callable[[], tuple[int, int]] | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, **{"worker_init_fn": _outlive_stop_signals, **options})
        self.position = position
        self._processes: list[Any] = []

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches from there to the end of the epoch.

        Raises:
            RuntimeError: a process of the loader died, also where torch only finds that it cannot be talked to.
        """
        if self.position is not None:
            sampler: Any = self.batch_sampler
            sampler.set_epoch(*self.position())
        others = multiprocessing.active_children()
        batches = super().__iter__()
        started = [child for child in multiprocessing.active_children() if child not in others]
        LOADER_PROCESSES.update(started)
        self._processes = started or self._processes  # those that persist
        try:
            yield from batches
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if all(child.is_alive() for child in self._processes):
                raise
            raise RuntimeError(f"a DataLoader worker died: {error}.") from error

    def state_dict(self) -> dict[str, Any]:
        """Lightning asks by this method whether a loader can go on inside an epoch; there is nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same for the way back."""


def _outlive_stop_signals(worker: int) -> None:
    """Let a loader's process outlive what asks the run to stop: SLURM, terminals and process groups tell every process.

    The step that is made needs its batch, and the run lets its loaders go when it is done: it has `GRACE` for that.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_GRACE) and None)


@atexit.register
def _kill_loader_processes() -> None:
    """End those that are alive when the run exits: multiprocessing would send them SIGTERM and wait."""
    for process in multiprocessing.active_children():
        if process in LOADER_PROCESSES:
            process.kill()
