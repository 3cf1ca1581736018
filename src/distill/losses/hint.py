"""Hint of FitNets: imitate the neck cell by cell, after a 1x1 convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.losses import base
from distill.losses.base import DistillLoss
from distill.losses.imitation import NORMALIZATIONS, NeckPairs, squared_error
from distill.types import DetectorSpec, DistillError, View

NECK = {"all": 1.0, "levels": None, "normalization": "mse"}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}


class Hint(DistillLoss):
    """Imitate the neck's maps by their mean squared error: the plain baseline of feature imitation.

    ::

        neck.all = sum_l mean (A_l(S_l) - T_l)^2            mean over n, c, h, w; A_l a 1x1 convolution

    Source: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv
    1412.6550, equation 3: one hidden layer, half the squared norm. The released cost of FitNets is
    ``normalization="half_l2"``: half the squared norm of each cell, in the mean over images and cells. The default here
    (mean squared error, 1x1 convolutions, all levels, weight 1) is the "mimic" term that DIST adds for detectors:
    ``distill=[dist,hint]``.
    :class:`distill.losses.mimic.Mimic` has the same term as a mean over levels, with masks.

    Shapes: maps (B, C, H, W). B is counted over all processes.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, or a number of the finest shared levels, None for all;
            ``normalization``: ``mse``, ``half_mse`` or ``half_l2`` (see `distill.losses.imitation`).
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({"neck.all": neck["all"]}, ramp, normalizer, seed)
        if neck["normalization"] not in NORMALIZATIONS:
            raise DistillError(
                f"neck.normalization: expected one of {', '.join(NORMALIZATIONS)}, got '{neck['normalization']}'"
            )
        self.divisor = NORMALIZATIONS[neck["normalization"]]
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.neck: NeckPairs | None = None
        if self.weights:
            self.neck = NeckPairs(student, teacher, neck["levels"], adapter, seed)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The term of `weights`, a scalar."""
        if self.neck is None:
            return {}
        shares = []
        for student_map, teacher_map in self.neck(student, teacher):
            error = squared_error(student_map, teacher_map)
            shares.append((error.sum(), self.divisor(student_map.shape[1]) * error.new_ones(()) * error.numel()))
        return self.average({"neck.all": base.summed(shares)})
