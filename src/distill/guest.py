"""The teacher as a guest: near the student, but no part of it.

A plain object, not a module, so that nothing that walks modules finds the teacher: not the optimiser, not
``state_dict``, not DDP, not an averaged copy of the student (copying a guest gives the guest itself).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.detectors.base import Detector
from distill.types import Batch, Facts, View


class Guest:
    """A frozen teacher.

    Args:
        detector: it is put into evaluation mode and frozen, for good.
        source: where its weights came from: a run folder, a file, or a name.
        values: what is already measured of it on this data, such as ``{"val/AP": 0.41}``.
    """

    def __init__(self, detector: Detector, source: str = "memory", values: Mapping[str, float] | None = None) -> None:
        detector.eval()
        detector.requires_grad_(False)
        self.detector = detector
        self.source = source
        self.values = dict(values or {})
        self._device: torch.device | None = None
        self._fingerprint: str | None = None

    @property
    def facts(self) -> Facts:
        """The detector's facts."""
        return self.detector.facts

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and buffers: the same teacher has the same one."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.detector.state_dict)
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """What is stored with a run, so that a resume finds the same teacher. Plain containers only."""
        return {
            "source": self.source,
            "sha256": self.fingerprint,
            "classes": list(self.facts.classes),
            "values": self.values,
        }

    def view(self, batch: Batch, *, training: bool = True, seed: int | None = None) -> View:
        """A frozen View on the batch's device; ``training`` chooses the counts of proposals."""
        device = batch.images.device
        if device != self._device:
            self.detector.to(device)
            self._device = device
        return self.detector.view(batch, training=training, frozen=True, seed=seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guest:
        return self


def fingerprint(state_dict: Callable[[], dict[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, value in state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
