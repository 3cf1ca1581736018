"""The teacher as a guest: near the student, but no part of it.

A plain object, not a module, so that nothing that walks modules finds the teacher: not the optimiser, not
``state_dict``, not DDP, not an averaged copy of the student (copying a guest gives the guest itself). Whatever else is
frozen and only looked at, such as a loss's image classifier, is kept in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.detectors.base import Detector
from distill.detectors.folding import fold
from distill.frozen import FrozenModel
from distill.types import Batch, DetectorSpec, DistillError, Target, View

DEFAULT_PREFETCH = ("neck",)
"""Stages of a teacher that most losses read: a first step's, of which nobody knows what its losses will."""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Teacher(FrozenModel):
    """A frozen teacher.

    The detector itself stays as it is. What teaches, `optimized`, is the same network made cheap: it shares each tensor that
    it does not change, and where the detector stays on the host, the device holds the weights once. On the host itself folding
    holds body and neck's convolutions twice, as does another layout of them; `tensors` are all that lie there.

    Args:
        detector: it is put into evaluation mode and frozen, for good.
        source: where its weights came from: a run folder, a file, or a name.
        values: what is already measured of it on this data, such as ``{"val/AP": 0.41}``.
        fold: whether batch norms are folded into the convolutions of body and neck: equal to 1e-5 of a map's scale in
            float32, and to 1e-10 in float64.
        channels_last: whether weights, and with them maps, are laid out with the channels last: equal as far as rounding.
        dtype: of the weights: ``float32``, ``bfloat16``, or ``auto``: on CUDA what autocast computes in, so that no step
            has to cast them anew, and elsewhere as they are.

    Raises:
        DistillError: an unknown dtype.
    """

    def __init__(
        self,
        detector: Detector,
        source: str = "memory",
        values: Mapping[str, float] | None = None,
        fold: bool = True,
        channels_last: bool = True,
        dtype: str = "auto",
    ) -> None:
        super().__init__(detector, source)
        if dtype not in DTYPES:
            raise DistillError(f"teacher.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.detector = detector
        self.values = dict(values or {})
        self.fold, self.channels_last, self.dtype = fold, channels_last, dtype
        self._optimized: tuple[tuple[torch.device, torch.dtype | None], Detector] | None = None

    @property
    def spec(self) -> DetectorSpec:
        """The detector's spec."""
        return self.detector.spec

    def identity(self) -> dict[str, Any]:
        """Its classes and measured values besides."""
        return {**super().identity(), "classes": list(self.spec.classes), "values": self.values}

    def optimized(self, device: torch.device) -> Detector:
        """The detector that teaches on this device, made when it is first asked for: with all options off, `detector`."""
        key = device, self._dtype(device)
        if not (self.fold or self.channels_last or key[1]):
            self.move(device)
            return self.detector
        if self._optimized is None or self._optimized[0] != key:
            self._optimized = None  # the old one goes before the new one comes
            # Lightning evaluates in inference mode, whose tensors no later step could save for its backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._optimized = key, self._made(*key)
        return self._optimized[1]

    def tensors(self) -> dict[str, Tensor]:
        """The detector's, and those that teach in their place."""
        if self._optimized is None:
            return super().tensors()
        made, twin = self._optimized
        return super().tensors() | {f"{name} as it teaches on {made}": each for name, each in twin.state_dict().items()}

    def _dtype(self, device: torch.device) -> torch.dtype | None:
        if self.dtype == "auto" and device.type == "cuda" and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return DTYPES[self.dtype]

    def _made(self, device: torch.device, dtype: torch.dtype | None) -> Detector:
        # Tensors named in the memo are not copied, so the twin holds the very ones of the detector until they change.
        tensors = [*self.detector.parameters(), *self.detector.buffers()]
        twin = copy.deepcopy(self.detector, {id(tensor): tensor for tensor in tensors})
        if self.fold:
            fold(twin.net, partial(_probe_neck, twin, tensors[0].device))
        for module in twin.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: self._laid(each, device, dtype) for name, each in held.items() if each is not None})
        return twin

    def _laid(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Any:
        """A weight or buffer as it is wanted: the same memory where nothing has to change, but never the same object."""
        layout = torch.channels_last if self.channels_last and tensor.dim() == 4 else torch.preserve_format
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        moved = tensor.detach().to(device, wanted, memory_format=layout)
        return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved

    def view(
        self, batch: Batch, *, training: bool = True, seed: int | None = None, prefetch: Sequence[str] = ()
    ) -> View:
        """A frozen View on the batch's device.

        `training` chooses the counts of proposals. The stages named in `prefetch` are computed at once: before the student's
        own pass, what a teacher's needs on the way is gone when the student's activations come.
        """
        return self.optimized(batch.images.device).view(
            batch, training=training, frozen=True, seed=seed, prefetch=prefetch
        )


@torch.no_grad()
def _probe_neck(detector: Detector, device: torch.device) -> Mapping[int, Tensor]:
    """Maps of the neck, or of a backbone without one, of a small picture in the weights' own precision."""
    pixels = torch.arange(3 * 64 * 96, device=device).remainder(251).to(torch.uint8).view(1, 3, 64, 96)
    nothing = Target(torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    batch = Batch(pixels, ((64, 96),), ((64, 96),), (nothing,), (0,))
    with torch.autocast(device.type, enabled=False):
        view = detector.view(batch, training=False, frozen=True)
        return view.neck if "neck" in view.spec.outputs else view.body
