"""Models that a run uses but does not train: the teacher, and models that a loss needs, such as an image classifier.

A `FrozenModel` is a plain object, not an ``nn.Module``, so code that walks modules does not see it: the optimizer,
``state_dict``, DDP, and an averaged copy of the student (copying a `FrozenModel` returns the same object).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.types import DistillError


class FrozenModel:
    """A frozen module that is not part of the module that uses it.

    Args:
        module: the constructor switches it to evaluation mode and turns its gradients off, permanently.
        source: origin of the weights: a run folder, a file, or a name.
    """

    def __init__(self, module: nn.Module, source: str) -> None:
        module.eval()
        module.requires_grad_(False)
        self.source = source
        self._module = module
        self._device: torch.device | None = None
        self._fingerprint: str | None = None
        self._bit_sums: dict[str, int] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and buffers. It is computed on first use."""
        if self._fingerprint is None:
            self._fingerprint = state_fingerprint(self._module.state_dict)
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that a resumed run can check that it uses the same module.

        The dict holds plain containers only.
        """
        return {"source": self.source, "sha256": self.fingerprint}

    def check_unchanged(self) -> None:
        """Check that weights and buffers equal those of the previous call. The first call only records them.

        The bits are summed on the module's device, so a call is cheap.

        Raises:
            DistillError: a weight or buffer changed. The message names examples.
        """
        current = bit_sums(self.tensors())
        before, self._bit_sums = self._bit_sums, current
        changed = [name for name in current if current[name] != before.get(name, current[name])]
        if changed:
            raise DistillError(
                f"the teacher ({self.source}) must not change, but in this epoch {len(changed)} of its {len(current)} "
                f"weights and buffers changed, such as {', '.join(changed[:3])}: a loss, a callback or your own code "
                "writes to them. Use the teacher under torch.no_grad(), leave it in evaluation mode, and keep it "
                "out of optimizers"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights and buffers by name. `check_unchanged` compares them."""
        return dict(self._module.state_dict())

    def move(self, device: torch.device) -> None:
        """Move the module to a device."""
        if device != self._device:
            self._module.to(device)
            self._device = device

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModel:
        return self


def frozen_models(losses: nn.Module) -> list[FrozenModel]:
    """Return the frozen models that losses hold as attributes, such as an image classifier."""
    return [value for module in losses.modules() for value in vars(module).values() if isinstance(value, FrozenModel)]


def bit_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, for each tensor, the sum of its elements' bits read as integers. Almost any change alters the sum."""
    integer_types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: value.detach().view(integer_types[value.element_size()]).sum(dtype=torch.int64)
        for name, value in tensors.items()
    }
    result: dict[str, int] = {}
    for device in {value.device for value in sums.values()}:  # one transfer, and so one wait, per device
        on_device = {name: value for name, value in sums.items() if value.device == device}
        result |= dict(zip(on_device, torch.stack([*on_device.values()]).tolist(), strict=True))
    return result


def state_fingerprint(state_dict: Callable[[], dict[str, Tensor]]) -> str:
    """Return the SHA-256 of the names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for name, value in state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
