"""Imitation of features: the frame of all methods that pull the student's maps or pooled regions towards the teacher's.

The frame adapts the student's channels, compares, and sums the errors inside each part of a mask. The method decides
which features are compared, where, and with which weight. A wrapper (PAD) sets `reweigh` to weigh each cell or region.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill.losses import adapters, base, masks
from distill.losses.base import SumAndCount
from distill.losses.kernels.blocks import values_per_block
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Pyramid, Size, View

MapError = Callable[[Tensor, Tensor], Tensor]
"""(student's map after its adapter, teacher's map), both (B, C, H, W) -> error summed over channels (B, H, W)."""
Reweigh = Callable[[Tensor, Tensor], Tensor]
"""(student's feature before its adapter, mean squared error per cell or region) -> weighted error."""

ADAPTER = {"kernel": 3, "start": "defeat", "relu": False}
NORMALIZATIONS: dict[str, Callable[[int], float]] = {
    "mse": lambda c: c,
    "half_mse": lambda c: 2 * c,
    "half_l2": lambda c: 2,
}
"""Divisor, per cell of the mask, of a sum over cells and C channels. The result is the mean over elements (``mse``),
half of it (``half_mse``, DeFeat) or half the squared L2 norm of a cell (``half_l2``, FGFI)."""


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of (S - T)^2; maps (B, C, H, W), the student's after its adapter -> (B, H, W)."""
    return _SquaredError.apply(upcast(student), upcast(teacher.detach()))  # type: ignore[no-any-return]


class _SquaredError(torch.autograd.Function):
    """Same values as plain autograd, but it stores one map, not two, and its backward pass is one product, not three.

    It has no second derivative: no loss here needs one.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        ctx.save_for_backward(difference)
        images = max(1, values_per_block(difference) * len(difference) // max(1, difference.numel()))
        return torch.cat([part.square().sum(1) for part in torch.split(difference, images)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient)[:, None], None


def masked(error: Tensor, mask: Tensor, divisor: float) -> SumAndCount:
    """Sum of M * error over images and cells, and `divisor` * sum(M); both tensors are (B, H, W)."""
    return (mask * error).sum(), divisor * mask.sum()


def mask_parts(mask: masks.Masks, names: Sequence[str]) -> dict[str, masks.Masks]:
    """The mask under all `names`, except for ``background``, which gets the complement of the mask."""
    return {
        name: {level: 1 - inside for level, inside in mask.items()} if name == "background" else mask for name in names
    }


@runtime_checkable
class SummedError(Protocol):
    """A `MapError` that can also sum itself under masks, at less cost than cell by cell."""

    def sums(self, student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Sequence[Tensor]:
        """For each mask (B, H, W), the sum over images and cells of mask times error."""


class MapImitation(nn.Module):
    """Imitation of the maps of one place (neck, backbone), level by level.

    Args:
        place: first part of the terms' names; also for messages.
        student, teacher: channels by stride of that place.
        levels: strides; None for all that both models have.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        error: the comparison.
        normalization: a key of `NORMALIZATIONS`.
        over_levels: ``mean`` or ``sum``.
        seed: of the start values of the adapters.

    Raises:
        DistillError: no shared stride, unequal channels without an adapter, an unknown option.
    """

    def __init__(
        self,
        place: str,
        student: Mapping[int, int],
        teacher: Mapping[int, int],
        levels: Sequence[int] | None = None,
        adapter: Mapping[str, Any] = ADAPTER,
        error: MapError = squared_error,
        normalization: str = "half_mse",
        over_levels: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise DistillError(
                f"{place}: expected a normalization of {', '.join(NORMALIZATIONS)}, got '{normalization}'"
            )
        self.place, self.error, self.divisor = place, error, NORMALIZATIONS[normalization]
        self.channels = dict(student)
        self.levels = base.shared_levels(place, student, teacher, levels)
        # `DistillLoss.average` takes the mean over levels.
        self.factor = {"mean": 1, "sum": len(self.levels)}[over_levels]
        options = base.merge_options("adapter", adapter, ADAPTER)
        self.adapters = adapters.adapters(student, teacher, self.levels, seed=base.derive_seed(seed, place), **options)
        self.reweigh: Mapping[str, Reweigh] | nn.ModuleDict | None = None

    @property
    def squared(self) -> bool:
        """Whether the error is a squared one, which a variance can weigh."""
        return self.error is squared_error or getattr(self.error, "squared", False) is True

    def sizes(self, maps: Pyramid) -> dict[int, Size]:
        """Stride -> (height, width) of the compared levels."""
        return {level: masks.map_size(maps[level]) for level in self.levels}

    def compare_necks(
        self, student: View, teacher: View, mask: masks.Mask, seeds: Sequence[int], parts: Sequence[str]
    ) -> dict[str, list[SumAndCount]]:
        """Shares of the neck's maps, under the mask of the batch's ground truth.

        Args:
            student, teacher: Views of one batch.
            mask: inside which cells are compared; the part ``background`` has the complement.
            seeds: one per image, of the mask ``random``.
            parts: last parts of the terms' names.
        """
        inside = mask(student, self.sizes(student.neck), seeds)
        return self(student.neck, teacher.neck, mask_parts(inside, parts))  # type: ignore[no-any-return]

    def forward(
        self, student: Pyramid, teacher: Pyramid, parts: Mapping[str, masks.Masks]
    ) -> dict[str, list[SumAndCount]]:
        """One share per level for each part: ``{"foreground": masks}`` gives ``{"neck.foreground": shares}``."""
        shares: dict[str, list[SumAndCount]] = {f"{self.place}.{part}": [] for part in parts}
        for level in self.levels:
            student_map, teacher_map = self.adapters[str(level)](student[level]), teacher[level]
            remedy = f"Leave this stride out with {self.place}.levels"
            base.require_equal_shapes(f"{self.place}, stride {level}", student_map, teacher_map, remedy)
            level_masks = [mask[level] for mask in parts.values()]
            level_shares = self._compare(student[level], student_map, teacher_map, level, level_masks)
            for part, (total, count) in zip(parts, level_shares, strict=True):
                shares[f"{self.place}.{part}"].append((self.factor * total, count))
        return shares

    def _compare(
        self, feature: Tensor, student_map: Tensor, teacher_map: Tensor, level: int, level_masks: Sequence[Tensor]
    ) -> list[SumAndCount]:
        """One share for each mask (B, H, W)."""
        channels = student_map.shape[1]
        divisor = self.divisor(channels)
        if isinstance(self.error, SummedError) and self.reweigh is None:
            totals = self.error.sums(student_map, teacher_map, level_masks)
            return [(total, divisor * mask.sum()) for total, mask in zip(totals, level_masks, strict=True)]
        error = self.error(student_map, teacher_map)
        if self.reweigh is not None:
            error = channels * self.reweigh[str(level)](feature, error / channels)
        return [masked(error, mask, divisor) for mask in level_masks]


class NeckPairs(nn.Module):
    """The neck's maps of both models, level by level, for comparisons that are no sum over cells.

    Args:
        student, teacher: specs of both detectors.
        levels: see :func:`distill.losses.base.shared_levels`.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        seed: of the start values of the adapters.

    Raises:
        DistillError: no shared stride, unequal channels without an adapter, an unknown option.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        levels: Sequence[int] | int | None,
        adapter: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.levels = base.shared_levels("neck", student.neck, teacher.neck, levels)
        own_seed = base.derive_seed(seed, "neck")
        self.adapters = adapters.adapters(student.neck, teacher.neck, self.levels, seed=own_seed, **adapter)

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, Tensor]]:
        """(B, C, H, W) of both by level, the student's after its adapter, in float32 at least."""
        pairs = []
        for level in self.levels:
            student_map, teacher_map = self.adapters[str(level)](student.neck[level]), teacher.neck[level]
            remedy = "Leave this stride out with neck.levels"
            base.require_equal_shapes(f"neck, stride {level}", student_map, teacher_map, remedy)
            pairs.append((upcast(student_map), upcast(teacher_map.detach())))
        return pairs


class RegionErrors(nn.Module):
    """Mean squared errors of the features of regions, computed elsewhere, before any mean over regions.

    Args:
        place: for messages.
        channels: of the student's features.
    """

    def __init__(self, place: str, channels: int) -> None:
        super().__init__()
        self.place, self.channels = place, channels
        self.reweigh: Reweigh | nn.Module | None = None

    def reweighed(self, feature: Tensor, error: Tensor) -> Tensor:
        """The student's features (R, C, h, w) before an adapter, and the errors (R,) -> the weighted errors (R,)."""
        if self.reweigh is None:
            return error
        weighted: Tensor = self.reweigh(feature, error)
        return weighted


class RegionImitation(RegionErrors):
    """Imitation of the pooled features of regions, by half their mean squared error.

    One adapter serves the regions of all levels, so all levels of a neck must have equally many channels. The arguments
    are those of :class:`MapImitation`.
    """

    def __init__(self, place: str, student: int, teacher: int, adapter: Mapping[str, Any] = ADAPTER, seed: int = 0):
        super().__init__(place, student)
        options = base.merge_options("adapter", adapter, ADAPTER)
        self.adapter = adapters.adapter(student, teacher, seed=base.derive_seed(seed, place), **options)

    def forward(self, student: Tensor, teacher: Tensor) -> SumAndCount:
        """(R, C, h, w) of both -> half the mean over elements, summed over regions, and the number of regions."""
        adapted = self.adapter(student)
        base.require_equal_shapes(f"{self.place} (R, C, h, w)", adapted, teacher, "Give both models the same regions")
        error = self.reweighed(student, squared_error(adapted, teacher).mean((1, 2)) / adapted.shape[1])
        return error.sum() / 2, torch.tensor(float(len(error)), device=error.device)
