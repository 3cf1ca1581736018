"""Measurements of memory in bytes: the peak of a call, the tensors of a step, and the tensors that autograd saves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Memory:
    """Bytes on the device in a step with losses. The peak should not exceed the sum of the parts.

    On the CPU, only tensors are counted. On CUDA, all memory from torch's allocator is counted, including the scratch
    memory of kernels.
    """

    student: float
    """Peak of the student-only step, with weights, gradients and optimizer state."""
    teacher: float
    """Weights and buffers of the teacher and of the losses' frozen models, including the copies that folding makes."""
    losses: float
    """Weights of the losses, with gradients, optimizer state and buffers."""
    held: float
    """Tensors that the losses keep for the backward pass, in addition to those of the student."""
    peak: float
    """Peak of the step with losses."""
    kept: float
    """Bytes between forward and backward pass, in addition to those of the student-only step.

    Expected to be at most `held`.
    """

    @property
    def sum(self) -> float:
        """Expected upper bound of the peak."""
        return self.student + self.teacher + self.losses + self.held

    @property
    def spared(self) -> float:
        """Bytes between the passes that no backward pass needs. The value is about 0 unless a loss keeps a View."""
        return self.kept - self.held


def peak(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Measure the peak bytes during a call: ``host`` (only on Linux) and ``device`` (only on CUDA)."""
    peaks: dict[str, float] = {}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks["host"] = 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    if device.type == "cuda":
        peaks["device"] = float(torch.cuda.max_memory_allocated(device))
    return peaks


def stored(tensors: Iterable[Tensor], device: torch.device) -> float:
    """Return the bytes of tensors that lie on `device`. Memory that several tensors share counts once."""
    pieces = [tensor.untyped_storage() for tensor in tensors if tensor.device == device]
    return float(sum({id(piece): piece.nbytes() for piece in pieces}.values()))


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that counts the bytes of new tensors that are alive: currently (`now`) and at the peak (`most`).

    The counts are exact and repeatable on every device. The scratch memory inside an operator is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0.0
        self._pieces: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, then count the memory of its results, without memory that its inputs share."""
        given = {id(piece) for piece in _pieces((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for piece in _pieces(result):
            if id(piece) not in given | self._pieces:
                self._pieces.add(id(piece))
                self.now += piece.nbytes()
                self.most = max(self.most, self.now)
                # Torch keeps the storage's Python object alive as long as its memory, so both are freed together.
                weakref.finalize(piece, self._gone, id(piece), piece.nbytes()).atexit = False
        return result

    def _gone(self, piece: int, size: int) -> None:
        self._pieces.discard(piece)
        self.now -= size


class Allocated:
    """Context with the counts of `Live`, from the statistics of torch's CUDA allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def __enter__(self) -> Allocated:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def now(self) -> float:
        """Bytes that are allocated now, in addition to those at the start of the context."""
        return float(torch.cuda.memory_allocated(self._device) - self._before)

    @property
    def most(self) -> float:
        """Bytes at the peak, in addition to those at the start of the context."""
        return float(torch.cuda.max_memory_allocated(self._device) - self._before)


def live(device: torch.device) -> Live | Allocated:
    """Return the counter for a device: `Allocated` on CUDA, else `Live`."""
    return Allocated(device) if device.type == "cuda" else Live()


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Context that records the storages that autograd saves, each once. The storages in `but` are not recorded."""

    def __init__(self, but: Iterable[torch.UntypedStorage] = ()) -> None:
        super().__init__(self._keep, lambda x: x)
        self._but = {id(piece): piece for piece in but}  # kept alive, so that no id is reused
        self._noted: dict[int, torch.UntypedStorage] = {}

    @property
    def pieces(self) -> list[torch.UntypedStorage]:
        """The recorded storages."""
        return [*self._noted.values()]

    @property
    def bytes(self) -> float:
        """Size of the recorded storages in bytes."""
        return float(sum(piece.nbytes() for piece in self.pieces))

    def _keep(self, x: Tensor) -> Tensor:
        piece = x.untyped_storage()
        if id(piece) not in self._but:
            self._noted[id(piece)] = piece
        return x


def _pieces(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
