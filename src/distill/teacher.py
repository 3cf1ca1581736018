"""The frozen teacher of a run, and the faster copy of it that computes the targets of the losses."""

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
"""Stages prefetched in the first step, before it is known which ones the losses read. Most losses read the neck."""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Teacher(FrozenModel):
    """A frozen teacher.

    `detector` keeps its weights as loaded. Losses read Views of `optimized`, a copy that computes the same function
    faster. The copy shares every tensor that needs no conversion with the detector. If the detector stays on the CPU
    and the copy is on a GPU, the GPU holds the weights once. If both are on the CPU, folding and a layout change keep a
    second copy of the convolution weights of body and neck. `tensors` returns the weights of both.

    Args:
        detector: the constructor switches it to evaluation mode and turns its gradients off, permanently.
        source: origin of the weights: a run folder, a file, or a name.
        values: results already measured on this data, such as ``{"val/AP": 0.41}``.
        fold: whether the copy folds batch norms into the convolutions of body and neck. Feature maps then differ by
            1e-5 of their scale in float32, and by 1e-10 in float64.
        channels_last: whether the copy's weights, and so its feature maps, use the channels-last layout. Only rounding
            differs.
        dtype: type of the copy's weights: ``float32``, ``bfloat16`` or ``auto``. ``auto`` uses autocast's type on CUDA,
            which saves the cast in every step, and keeps the weights' own type elsewhere.

    Raises:
        DistillError: ``dtype`` is unknown.
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
        """Return what a checkpoint stores: in addition to the base class's entries, the classes and measured values."""
        return {**super().identity(), "classes": list(self.spec.classes), "values": self.values}

    def optimized(self, device: torch.device) -> Detector:
        """Return the faster copy on this device. It is built on first use.

        Without folding, layout change and type conversion, the result is `detector` itself, moved to the device.
        """
        key = device, self._resolve_dtype(device)
        if not (self.fold or self.channels_last or key[1]):
            self.move(device)
            return self.detector
        if self._optimized is None or self._optimized[0] != key:
            self._optimized = None  # frees the old copy before the new one needs memory
            # Lightning evaluates in inference mode. A later training step could not save inference tensors for
            # backward.
            with torch.inference_mode(False), torch.no_grad():
                self._optimized = key, self._build_optimized(*key)
        return self._optimized[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights and buffers of the detector and of its faster copy, by name."""
        if self._optimized is None:
            return super().tensors()
        key, detector = self._optimized
        return super().tensors() | {
            f"{name} of the optimized teacher for {key}": value for name, value in detector.state_dict().items()
        }

    def _resolve_dtype(self, device: torch.device) -> torch.dtype | None:
        if self.dtype == "auto" and device.type == "cuda" and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return DTYPES[self.dtype]

    def _build_optimized(self, device: torch.device, dtype: torch.dtype | None) -> Detector:
        # deepcopy does not copy objects named in its memo, so both detectors share all tensors until one is converted.
        tensors = [*self.detector.parameters(), *self.detector.buffers()]
        optimized = copy.deepcopy(self.detector, {id(tensor): tensor for tensor in tensors})
        if self.fold:
            fold(optimized.net, partial(_probe_neck, optimized, tensors[0].device))
        for name, module in optimized.net.named_modules():
            is_precise = any(f"{name}.".startswith(f"{part}.") for part in optimized.float32_parts)
            own_dtype = None if is_precise else dtype
            for registry in (module._parameters, module._buffers):
                registry.update(
                    {
                        key: self._convert_tensor(value, device, own_dtype)
                        for key, value in registry.items()
                        if value is not None
                    }
                )
        return optimized

    def _convert_tensor(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Any:
        """Move a weight or buffer to the device, layout and type of the copy.

        The result shares memory with the input if nothing has to change, but is always a new object.
        """
        layout = torch.channels_last if self.channels_last and tensor.dim() == 4 else torch.preserve_format
        target_dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        converted = tensor.detach().to(device, target_dtype, memory_format=layout)
        return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted

    def view(
        self, batch: Batch, *, training: bool = True, seed: int | None = None, prefetch: Sequence[str] = ()
    ) -> View:
        """Return a frozen View of the faster copy, on the batch's device.

        Args:
            batch: the images to look at.
            training: whether the numbers of proposals are those of training.
            seed: seed of all random draws; None: they come from the global stream.
            prefetch: names of the stages to compute at once. Before the student's forward pass, the teacher's
                intermediate tensors are freed before the student's activations need memory.
        """
        return self.optimized(batch.images.device).view(
            batch, training=training, frozen=True, seed=seed, prefetch=prefetch
        )


@torch.no_grad()
def _probe_neck(detector: Detector, device: torch.device) -> Mapping[int, Tensor]:
    """Return the feature maps of a small synthetic image, in the precision of the weights.

    The maps are the neck's, or the body's for a detector without a neck.
    """
    size = height, width = detector.probe_size
    pixels = torch.arange(3 * height * width, device=device).remainder(251).to(torch.uint8).view(1, 3, *size)
    no_objects = Target(torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    batch = Batch(pixels, (size,), (size,), (no_objects,), (0,))
    with torch.autocast(device.type, enabled=False):
        view = detector.view(batch, training=False, frozen=True)
        return view.neck if "neck" in view.spec.outputs else view.body
