"""The frame that all methods share which make the student's features like the teacher's: of maps, and of regions.

It adapts the student's channels, compares, and sums inside each part of a mask. The method says what is compared, where
and with which weight; `reweigh` is the place where a wrapper (PAD) gives each cell or region a weight of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill.losses import base, masks
from distill.losses.adapters import adapter as one_adapter
from distill.losses.adapters import adapters
from distill.losses.base import SumAndCount
from distill.losses.kernels.blocks import cells
from distill.precision import upcast
from distill.types import DistillError, Pyramid, Size

Error = Callable[[Tensor, Tensor], Tensor]
"""(student's map after its adapter, teacher's map), both (B, C, H, W) -> sum over channels per cell (B, H, W)."""
Reweigh = Callable[[Tensor, Tensor], Tensor]
"""(student's feature before its adapter, mean squared error per cell or region) -> the error that counts."""

ADAPTER = {"kernel": 3, "start": "defeat", "relu": False}
COUNTS: dict[str, Callable[[int], float]] = {"mse": lambda c: c, "half_mse": lambda c: 2 * c, "half_l2": lambda c: 2}
"""What a sum over cells and C channels is divided by, per cell of the mask: the mean over elements, half of it (DeFeat),
or half the squared L2 norm of a cell (FGFI)."""


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of (S - T)^2; maps (B, C, H, W), the student's after its adapter -> (B, H, W)."""
    return _SquaredError.apply(upcast(student), upcast(teacher.detach()))  # type: ignore[no-any-return]


class _SquaredError(torch.autograd.Function):
    """As autograd's own, but no second map lies beside the difference, and its gradient is one product instead of three.

    That gradient has none of its own: no loss here is one of gradients.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        ctx.save_for_backward(difference)
        images = max(1, cells(difference) * len(difference) // max(1, difference.numel()))
        return torch.cat([part.square().sum(1) for part in torch.split(difference, images)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * slope)[:, None], None


def masked(error: Tensor, mask: Tensor, count: float) -> SumAndCount:
    """Sum of M * error over images and cells, and `count` * sum(M); both (B, H, W)."""
    return (mask * error).sum(), count * mask.sum()


@runtime_checkable
class Summed(Protocol):
    """An `Error` that can sum itself under masks for less than cell by cell."""

    def sums(self, student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of each mask (B, H, W), the sum over images and cells of mask times error."""


class MapImitation(nn.Module):
    """Maps of one place (neck, backbone), level by level.

    Args:
        place: for messages, and the start of the terms' names.
        student, teacher: channels by stride of that place.
        levels: strides; None for all that both have.
        adapter: ``kernel``, ``start``, ``relu``, as `distill.losses.adapters` has them.
        error: what is compared.
        count: a key of `COUNTS`: the normalisation.
        over_levels: ``mean`` or ``sum``.
        seed: of the adapters' start values.

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
        error: Error = squared_error,
        count: str = "half_mse",
        over_levels: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if count not in COUNTS:
            raise DistillError(f"{place}: expected a normalisation of {', '.join(COUNTS)}, got '{count}'")
        self.place, self.error, self.count = place, error, COUNTS[count]
        self.channels = dict(student)
        self.levels = base.shared_levels(place, student, teacher, levels)
        # `DistillLoss.average` takes the mean over levels.
        self.factor = {"mean": 1, "sum": len(self.levels)}[over_levels]
        how = base.options("adapter", adapter, ADAPTER)
        self.adapters = adapters(student, teacher, self.levels, seed=base.derive(seed, place), **how)
        self.reweigh: Mapping[str, Reweigh] | nn.ModuleDict | None = None

    @property
    def squared(self) -> bool:
        """Whether its error is a squared one: what a variance can weigh."""
        return self.error is squared_error or getattr(self.error, "squared", False) is True

    def sizes(self, maps: Pyramid) -> dict[int, Size]:
        """Stride -> (height, width) of the levels that are compared."""
        return {level: masks.size(maps[level]) for level in self.levels}

    def forward(
        self, student: Pyramid, teacher: Pyramid, parts: Mapping[str, masks.Masks]
    ) -> dict[str, list[SumAndCount]]:
        """A share per level for each part: ``{"foreground": masks}`` gives ``{"neck.foreground": shares}``."""
        shares: dict[str, list[SumAndCount]] = {f"{self.place}.{part}": [] for part in parts}
        for level in self.levels:
            ours, theirs = self.adapters[str(level)](student[level]), teacher[level]
            remedy = f"Leave this stride out with {self.place}.levels"
            base.check_shapes(f"{self.place}, stride {level}", ours, theirs, remedy)
            found = self._compare(student[level], ours, theirs, level, [mask[level] for mask in parts.values()])
            for part, (total, count) in zip(parts, found, strict=True):
                shares[f"{self.place}.{part}"].append((self.factor * total, count))
        return shares

    def _compare(
        self, feature: Tensor, ours: Tensor, theirs: Tensor, level: int, inside: Sequence[Tensor]
    ) -> list[SumAndCount]:
        """One share for each mask (B, H, W)."""
        channels = ours.shape[1]
        if isinstance(self.error, Summed) and self.reweigh is None:
            totals = self.error.sums(ours, theirs, inside)
            return [(total, self.count(channels) * mask.sum()) for total, mask in zip(totals, inside, strict=True)]
        error = self.error(ours, theirs)
        if self.reweigh is not None:
            error = channels * self.reweigh[str(level)](feature, error / channels)
        return [masked(error, mask, self.count(channels)) for mask in inside]


class RegionErrors(nn.Module):
    """Mean squared errors of the features of regions, whoever computed them, before any mean over regions.

    Args:
        place: for messages.
        channels: of the student's features.
    """

    def __init__(self, place: str, channels: int) -> None:
        super().__init__()
        self.place, self.channels = place, channels
        self.reweigh: Reweigh | nn.Module | None = None

    def weighed(self, feature: Tensor, error: Tensor) -> Tensor:
        """The student's features (R, C, h, w) before an adapter, and the errors (R,) -> the errors that count."""
        if self.reweigh is None:
            return error
        weighed: Tensor = self.reweigh(feature, error)
        return weighed


class RegionImitation(RegionErrors):
    """Pooled features of regions, as half their mean squared error; arguments as of :class:`MapImitation`.

    One adapter serves the regions of all levels, so all levels of a neck must have equally many channels.
    """

    def __init__(self, place: str, student: int, teacher: int, adapter: Mapping[str, Any] = ADAPTER, seed: int = 0):
        super().__init__(place, student)
        how = base.options("adapter", adapter, ADAPTER)
        self.adapter = one_adapter(student, teacher, seed=base.derive(seed, place), **how)

    def forward(self, student: Tensor, teacher: Tensor) -> SumAndCount:
        """(R, C, h, w) of both -> half the mean over elements, summed over regions, and their number."""
        ours = self.adapter(student)
        base.check_shapes(f"{self.place} (R, C, h, w)", ours, teacher, "Give both models the same regions")
        error = self.weighed(student, squared_error(ours, teacher).mean((1, 2)) / ours.shape[1])
        return error.sum() / 2, torch.tensor(float(len(error)), device=error.device)


def parts(mask: masks.Masks, names: Sequence[str]) -> dict[str, masks.Masks]:
    """``foreground`` and ``background`` of a mask, those of them that are named."""
    whole = {"foreground": mask, "background": {level: 1 - inside for level, inside in mask.items()}}
    return {name: whole[name] for name in names}
