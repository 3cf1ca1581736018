"""The teacher as a guest: near the student, but no part of it.

A plain object, not a module, so that nothing that walks modules finds the teacher: not the optimiser, not
``state_dict``, not DDP, not an averaged copy of the student (copying a guest gives the guest itself). Whatever else is
frozen and only looked at, such as a loss's image classifier, is kept in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.detectors.base import Detector
from distill.types import Batch, DistillError, Facts, View


class Frozen:
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
        self._bits: dict[str, int] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and buffers: the same module has the same one."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._module.state_dict)
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """What is stored with a run, so that a resume finds the same module. Plain containers only."""
        return {"source": self.source, "sha256": self.fingerprint}

    def check(self) -> None:
        """Refuse to go on where weights or buffers are no longer those of the first call. Summed up on their device: cheap.

        Raises:
            DistillError: what has changed.
        """
        found = bits(self._module.state_dict())
        before, self._bits = self._bits or found, found
        changed = [name for name in found if found[name] != before.get(name)]
        if changed:
            raise DistillError(
                f"the teacher ({self.source}) must stay as it is, but in this epoch {len(changed)} of its {len(found)} "
                f"weights and buffers changed, such as {', '.join(changed[:3])}: a loss, a callback or code of your own "
                "writes into it. Read it under torch.no_grad(), leave it in evaluation mode, and keep it out of optimisers"
            )

    def move(self, device: torch.device) -> None:
        """Bring the module to where the data is."""
        if device != self._device:
            self._module.to(device)
            self._device = device

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self


class Guest(Frozen):
    """A frozen teacher.

    Args:
        detector: it is put into evaluation mode and frozen, for good.
        source: where its weights came from: a run folder, a file, or a name.
        values: what is already measured of it on this data, such as ``{"val/AP": 0.41}``.
    """

    def __init__(self, detector: Detector, source: str = "memory", values: Mapping[str, float] | None = None) -> None:
        super().__init__(detector, source)
        self.detector = detector
        self.values = dict(values or {})

    @property
    def facts(self) -> Facts:
        """The detector's facts."""
        return self.detector.facts

    def identity(self) -> dict[str, Any]:
        """Its classes and measured values besides."""
        return {**super().identity(), "classes": list(self.facts.classes), "values": self.values}

    def view(self, batch: Batch, *, training: bool = True, seed: int | None = None) -> View:
        """A frozen View on the batch's device; ``training`` chooses the counts of proposals."""
        self.move(batch.images.device)
        return self.detector.view(batch, training=training, frozen=True, seed=seed)


def bits(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> the sum of its values' bits, read as whole numbers: another one after almost any change."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [value.detach().view(whole[value.element_size()]).sum(dtype=torch.int64) for value in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist(), strict=True)) if sums else {}


def fingerprint(state_dict: Callable[[], dict[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, value in state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
