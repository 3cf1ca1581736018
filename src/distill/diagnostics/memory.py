"""Bytes of memory: at the peak of a call, in the tensors that a step makes, in what autograd keeps for its backward pass."""

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
    """Bytes on the device of a step with losses. Its peak should stay below the sum of the parts.

    What tensors hold; on CUDA what torch's allocator gives, the scratch memory of kernels included.
    """

    student: float
    """Peak of the student-only step: its weights, their gradients and the optimiser's state included."""
    teacher: float
    """Weights and buffers of all that teaches: of a folded teacher also what folding changed, if both forms lie there."""
    losses: float
    """What the losses train, their gradients and the optimiser's state of them, and their buffers."""
    held: float
    """What the losses keep for the backward pass, beyond what the student keeps anyway: maps and adapters' activations."""
    peak: float
    """Of the step with losses."""
    kept: float
    """What lies there between forward and backward pass beyond what the student alone leaves there: no more than `held`."""

    @property
    def sum(self) -> float:
        """What the peak may be: student, teacher, losses and what they hold."""
        return self.student + self.teacher + self.losses + self.held

    @property
    def spared(self) -> float:
        """What lies there between the passes though no backward pass asks for it, as where a loss keeps a View: about 0."""
        return self.kept - self.held


def peak(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Peak bytes during a call: ``host``, where the system tells (Linux), and ``device``, on CUDA."""
    found: dict[str, float] = {}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        found["host"] = 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    if device.type == "cuda":
        found["device"] = float(torch.cuda.max_memory_allocated(device))
    return found


def stored(tensors: Iterable[Tensor], device: torch.device) -> float:
    """Bytes of these tensors on a device; memory that several of them share counts once."""
    pieces = [each.untyped_storage() for each in tensors if each.device == device]
    return float(sum({id(piece): piece.nbytes() for piece in pieces}.values()))


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, counts the bytes of the tensors that are made: ``now``, falling as they go, and at ``most``.

    Exact and repeatable on every device, but blind to the scratch memory inside of an operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0.0
        self._pieces: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, then note the memory of its results that is not that of its inputs."""
        given = {id(piece) for piece in _pieces((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for piece in _pieces(result):
            if id(piece) not in given | self._pieces:
                self._pieces.add(id(piece))
                self.now += piece.nbytes()
                self.most = max(self.most, self.now)
                # Torch keeps the storage's Python object for as long as the memory lives, so its end is that of the memory.
                weakref.finalize(piece, self._gone, id(piece), piece.nbytes()).atexit = False
        return result

    def _gone(self, piece: int, size: int) -> None:
        self._pieces.discard(piece)
        self.now -= size


class Allocated:
    """As `Live`, by what torch's CUDA allocator has given since it was opened."""

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
        """Bytes that are held."""
        return float(torch.cuda.memory_allocated(self._device) - self._before)

    @property
    def most(self) -> float:
        """Bytes at the peak."""
        return float(torch.cuda.max_memory_allocated(self._device) - self._before)


def live(device: torch.device) -> Live | Allocated:
    """What counts best on a device."""
    return Allocated(device) if device.type == "cuda" else Live()


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """While open, notes the memory that autograd keeps, each piece once, and none of `but`."""

    def __init__(self, but: Iterable[torch.UntypedStorage] = ()) -> None:
        super().__init__(self._keep, lambda x: x)
        self._but = {id(piece): piece for piece in but}  # kept alive, or an id could be given away again
        self._noted: dict[int, torch.UntypedStorage] = {}

    @property
    def pieces(self) -> list[torch.UntypedStorage]:
        """What was noted."""
        return [*self._noted.values()]

    @property
    def bytes(self) -> float:
        """Of all pieces."""
        return float(sum(piece.nbytes() for piece in self.pieces))

    def _keep(self, x: Tensor) -> Tensor:
        piece = x.untyped_storage()
        if id(piece) not in self._but:
            self._noted[id(piece)] = piece
        return x


def _pieces(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (each.untyped_storage() for each in tree_leaves(tree) if isinstance(each, Tensor))
