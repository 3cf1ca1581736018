"""A vision foundation model teaches the student's deepest map, with a weight that follows its share of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import distributed
from distill.losses import adapters, base
from distill.losses.base import DistillLoss
from distill.precision import upcast
from distill.types import ALTERNATIVES, Batch, DetectorSpec, DistillError, View

NECK: dict[str, Any] = {"cosine": 5.0, "level": None}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}
STEER: dict[str, Any] = {"share": 0.1, "tolerance": 0.01}
RATIO = 0.1, 10.0
"""Bounds on one correction of the weight."""


class FeatureModel(Protocol):
    """The interface of the model; :class:`distill.FoundationModel` has it.

    It is no `nn.Module`, so that the loss does not register it.
    """

    channels: int

    def features(self, batch: Batch, cells: tuple[int, int]) -> Tensor:
        """Features (B, channels, h, w) on a grid of `cells`, without a gradient."""

    def identity(self) -> dict[str, Any]:
        """Source and sha256 of the weights."""


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos(S, T)`` of each cell; maps (B, C, H, W) of both -> (B, H, W)."""
    student = upcast(student)
    return 1 - F.cosine_similarity(student, teacher.detach().to(student.dtype), dim=1)


def cells_inside(batch: Batch, cells: tuple[int, int]) -> Tensor:
    """(B, h, w) bool: the cells whose center is in the image, not in its padding."""
    height, width = batch.images.shape[-2:]
    device = batch.images.device
    sizes = torch.tensor(batch.sizes, dtype=torch.float32).to(device, non_blocking=True)
    rows, columns = (
        (torch.arange(count, device=device) + 0.5) * (side / count)
        for count, side in zip(cells, (height, width), strict=True)
    )
    return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]


def corrected(weight: float, share: float, target: float, tolerance: float) -> float:
    """The weight of a term that shall have the share `target` of a gradient, and has the share `share`.

    ::

        weight p* (1 - p) / (p (1 - p*))     p* = target + tolerance for a p below the interval, else target - tolerance

    Inside the interval ``target +- tolerance`` the weight stays. The factor is bounded by 0.1 and 10. A share of 1 or
    more gets the factor 0.1: the gradients of the other losses then cancel a part of the term's gradient. A share of 0
    or below changes nothing.
    """
    if abs(share - target) <= tolerance or share <= 0:
        return weight
    if share >= 1:
        return weight * RATIO[0]
    far = target + math.copysign(tolerance, target - share)
    factor = far * (1 - share) / (share * (1 - far))
    return weight * min(max(factor, RATIO[0]), RATIO[1])


class Foundation(DistillLoss):
    """Imitate the patch features of a frozen vision transformer (such as DINOv2) on the deepest map of the neck.

    ::

        neck.cosine = 1/N sum over images and cells  1 - cos(A S, T)

    A is a 1 x 1 convolution from the student's channels to the model's. T has one patch per cell: the images are
    resized so that the model's grid is that of the map. N is the number of cells inside the images.

    The weight follows the term's share of the gradient. p is the L1 norm of the gradient of the weighted term on the
    map, divided by that of the gradient of the whole loss on the map, both summed over the epoch. Before each epoch, if
    p is outside of ``share +- tolerance``, the weight is multiplied by ``p* (1 - p) / (p (1 - p*))`` with the far bound
    p*, see :func:`corrected`.

    Source: Liao et al., "RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models",
    2025, arXiv 2510.25257, Deep Semantic Injector and Gradient-guided Adaptive Modulation; the correction is that of
    its released code. Published AP on COCO: RT-DETRv4 S 49.8, M 53.7, L 55.4, X 57.0.

    Where we differ: the map is the neck's deepest, not the output of the encoder's transformer layer, so any detector
    with a neck can be a student; the share is measured at this map, not at the parameters of the encoder, so the
    published shares (11 % for S, 2 to 3.5 % for the others) do not carry over, and 10 % is a choice without a
    measurement. It is measured on one or many processes alike: the released code looks for parameters by a name that
    only a wrapped model has, reads 0 on one GPU, and corrects the weight every epoch.

    Shapes: maps (B, C, H, W). Published weights at the start: 5 (S, M), 15 (L), 20 (X). No detector teacher is needed.

    Args:
        student: spec of a detector with a neck.
        teacher: not read.
        model: a :class:`distill.FoundationModel`, frozen and not part of this module.
        neck: weight of its term at the start; ``level``: the stride, None for the largest.
        steer: ``share`` in (0, 1), None for a constant weight; ``tolerance``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    needs_teacher = False
    factor_of_weight: Tensor
    """The correction so far, a scalar."""
    norms: Tensor
    """(2,) sums over the epoch of the gradients' L1 norms: of the term, and of the whole loss."""
    last_norms: Tensor
    """(2,) of this process's last step, not yet in `norms`."""

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec | None,
        model: FeatureModel,
        neck: Mapping[str, Any] = NECK,
        steer: Mapping[str, Any] = STEER,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({"neck.cosine": neck["cosine"]}, ramp, normalizer, seed)
        options = base.merge_options("steer", steer, STEER)
        share, tolerance = options["share"], options["tolerance"]
        if share is not None and not (
            base.is_number(share) and base.is_number(tolerance) and 0 < share - tolerance <= share + tolerance < 1
        ):
            raise DistillError(
                "steer: expected a share of the gradient with share - tolerance above 0 and share + tolerance below 1, "
                f"or share=null for a constant weight, got share={share} and tolerance={tolerance}"
            )
        if not student.neck:
            raise DistillError(f"neck: the student has no feature pyramid. {ALTERNATIVES['neck'].capitalize()}")
        level = max(student.neck) if neck["level"] is None else neck["level"]
        if level not in student.neck:
            raise DistillError(f"neck.level: expected one of the strides {list(student.neck)}, got {level!r}")
        self.model, self.level, self.share, self.tolerance = model, level, share, tolerance
        options = base.merge_options("adapter", adapter, ADAPTER)
        self.adapter = adapters.adapter(student.neck[level], model.channels, seed=base.derive_seed(seed), **options)
        self.register_buffer("factor_of_weight", torch.ones((), dtype=torch.float64))
        for name in ("norms", "last_norms"):
            self.register_buffer(name, torch.zeros(2, dtype=torch.float64))
        self._factor: float | None = None
        self.register_load_state_dict_post_hook(_forget_factor)  # type: ignore[no-untyped-call]

    def identity(self) -> dict[str, Any]:
        """Source and sha256 of the model's weights."""
        return self.model.identity()

    def factor(self, term: str, progress: float, epochs: float) -> float:
        """The ramp's factor times the correction."""
        if self._factor is None:
            self._factor = float(self.factor_of_weight)
        return super().factor(term, progress, epochs) * self._factor

    @torch.no_grad()
    def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
        """Correct the weight by the share that was measured in the last epoch."""
        super().on_epoch_start(epoch, data, student, teacher)
        own, whole = self.norms.tolist()
        if self.share is not None and own > 0:
            share = own / whole if whole > 0 else math.inf
            self._factor = corrected(float(self.factor_of_weight), share, self.share, self.tolerance)
            self.factor_of_weight.fill_(self._factor)
        self.norms.zero_()
        self.last_norms.zero_()

    def forward(self, student: View, teacher: View | None = None) -> dict[str, Tensor]:
        """The term of `weights`, a scalar; the teacher is not read."""
        if not self.weights:
            return {}
        neck = student.neck[self.level]
        cells = neck.shape[-2], neck.shape[-1]
        target = self.model.features(student.batch, cells)
        student_map = self.adapter(self._measured(neck))
        base.require_equal_shapes("neck", student_map, target, "Set adapter.kernel=1")
        with torch.autocast(neck.device.type, enabled=False):
            inside = cells_inside(student.batch, cells)
            share = base.sum_and_count(cosine_distance(student_map, target), inside)
        return self.average({"neck.cosine": [share]})

    def _measured(self, neck: Tensor) -> Tensor:
        """The map, whose gradients of the term and of the whole loss are measured in the next backward pass.

        A further backward pass of the same step, such as that of a diagnosis, is overwritten by the training's own.
        """
        if self.share is None or not (neck.requires_grad and self.training):
            return neck
        self._collect()
        alias = neck.view_as(neck)  # a node of its own, which only this loss reads
        alias.register_hook(lambda gradient: self._store(0, gradient))  # type: ignore[no-untyped-call]
        neck.register_hook(lambda gradient: self._store(1, gradient))  # type: ignore[no-untyped-call]
        return alias

    def _store(self, place: int, gradient: Tensor) -> None:
        self.last_norms[place] = gradient.detach().abs().sum(dtype=torch.float64)

    @torch.no_grad()
    def _collect(self) -> None:
        """Add the last step's norms over all processes. Steps that were not finite are left out."""
        total, _ = distributed.sum_over_ranks(self.last_norms)
        self.norms += torch.where(total.isfinite().all(), total, torch.zeros_like(total))
        self.last_norms.zero_()


def _forget_factor(module: torch.nn.Module, incompatible: Any) -> None:
    """Read the correction from the loaded state."""
    assert isinstance(module, Foundation)
    module._factor = None
