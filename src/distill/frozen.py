"""Models that are used but not trained, and that are not part of the object which holds them.

A `FrozenModel` is a plain object, not a module. Nothing that walks modules finds it: not the optimizer, not ``state_dict``,
not DDP, and not an averaged copy of the student (copying a `FrozenModel` returns the same object).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.types import DistillError


class FrozenModel:
    """A module that is not trained, and no part of the object that holds it.

    Args:
        module: it is put into evaluation mode and frozen, for good.
        source: where its weights came from: a run folder, a file, or a name.
    """

    def __init__(self, module: nn.Module, source: str) -> None:
        module.eval()
        module.requires_grad_(False)
        self.source = source
        self._module = module
        self._device: torch.device | None = None
        self._fingerprint: str | None = None
        self._bits: dict[str, int] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and buffers: the same module has the same one."""
        if self._fingerprint is None:
            self._fingerprint = state_fingerprint(self._module.state_dict)
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """What is stored with a run, so that a resume finds the same module. Plain containers only."""
        return {"source": self.source, "sha256": self.fingerprint}

    def check_unchanged(self) -> None:
        """Refuse to go on where weights or buffers are no longer those of the first call. Summed up on their device: cheap.

        Raises:
            DistillError: what has changed.
        """
        found = bit_sums(self.tensors())
        before, self._bits = self._bits, found
        changed = [name for name in found if found[name] != before.get(name, found[name])]
        if changed:
            raise DistillError(
                f"the teacher ({self.source}) must stay as it is, but in this epoch {len(changed)} of its {len(found)} "
                f"weights and buffers changed, such as {', '.join(changed[:3])}: a loss, a callback or code of your own "
                "writes into it. Read it under torch.no_grad(), leave it in evaluation mode, and keep it out of optimisers"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All weights and buffers, none of which may change."""
        return dict(self._module.state_dict())

    def move(self, device: torch.device) -> None:
        """Bring the module to where the data is."""
        if device != self._device:
            self._module.to(device)
            self._device = device

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModel:
        return self


def frozen_models(losses: nn.Module) -> list[FrozenModel]:
    """The guests that losses keep for themselves, such as an image classifier."""
    return [each for module in losses.modules() for each in vars(module).values() if isinstance(each, FrozenModel)]


def bit_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> the sum of its values' bits, read as whole numbers: another one after almost any change."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: value.detach().view(whole[value.element_size()]).sum(dtype=torch.int64) for name, value in tensors.items()
    }
    found: dict[str, int] = {}
    for device in {value.device for value in sums.values()}:  # one look at each
        there = {name: value for name, value in sums.items() if value.device == device}
        found |= dict(zip(there, torch.stack([*there.values()]).tolist(), strict=True))
    return found


def state_fingerprint(state_dict: Callable[[], dict[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, value in state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
