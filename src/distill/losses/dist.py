"""DIST: imitate the teacher's class probabilities by correlation, over the classes of a region and over the regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import distributed
from distill.losses import base, heads
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.precision import upcast
from distill.types import DetectorSpec, View

CLASSES = {"inter": 1.0, "intra": 1.0}
EPSILON = 1e-8
"""Added to the product of two vector norms, as in the released code."""


def correlations(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's coefficient of each row; (R, K) twice -> (R,)."""
    x, y = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    return (x * y).sum(1) / (_lengths(x.square().sum(1)) * _lengths(y.square().sum(1)) + EPSILON)


def column_correlations(student: Tensor, teacher: Tensor, everywhere: bool = False) -> Tensor:
    """Pearson's coefficient of each column; (R, K) twice -> (K,).

    Args:
        student, teacher: one row for each region or anchor cell.
        everywhere: whether the columns span the rows of all processes. If so, every process must call this function.
    """
    add = distributed.sum_with_gradient if everywhere else torch.clone
    rows = add(student.new_full((1,), float(len(student)))).clamp(min=1)
    sums = add(torch.stack([student.sum(0), teacher.sum(0)])) / rows
    x, y = student - sums[0], teacher - sums[1]
    products, x_squares, y_squares = add(torch.stack([(x * y).sum(0), x.square().sum(0), y.square().sum(0)])).unbind()
    return products / (_lengths(x_squares) * _lengths(y_squares) + EPSILON)


def _lengths(squares: Tensor) -> Tensor:
    """Square root without a gradient at 0, where the slope of the root is infinite."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


class DIST(DistillLoss):
    """Imitate class probabilities up to scale and offset: of each region over classes, of each class over regions.

    ::

        classes.inter = tau^2 (1 - mean_i r(Y_s,i ; Y_t,i))          rows i: regions or cells
        classes.intra = tau^2 (1 - mean_j r(Y_s,.j ; Y_t,.j))        columns j: classes
        r = Pearson's coefficient,  Y = probabilities of logits / tau

    Two-stage: Y (R, K+1) is the softmax over the student's sampled regions, for which both box heads run. One-stage: Y
    (B H W, A K) is the sigmoid, one matrix and one pair of terms for each level, added.

    Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv
    2205.10536, and its released code: beta = gamma = 1, tau = 1. With ``distill=[dist,hint]`` it is the paper's
    "DIST + mimic".

    The correlations of columns are computed over one process's batch, as published; with ``normalizer="global"`` over
    the regions of all processes. Where we differ: the logits of a teacher with more classes are reduced to the
    student's before the softmax; without regions the terms are 0.

    Args:
        student, teacher: specs of both detectors: both two-stage, or one-stage with equal anchors.
        classes: weights of its terms, ``inter`` (beta) and ``intra`` (gamma).
        temperature: tau.
        ramp, normalizer, seed: see :class:`DistillLoss`. The loss draws nothing at random.
    """

    classes: ClassMap

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        classes: Mapping[str, float] = CLASSES,
        temperature: float = 1.0,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "process",
        seed: int = 0,
    ) -> None:
        classes = base.merge_options("classes", classes, CLASSES)
        super().__init__({f"classes.{term}": weight for term, weight in classes.items()}, ramp, normalizer, seed)
        self.temperature = base.check_temperature("temperature", temperature)
        self.two_stage = "rois" in student.outputs
        if self.weights:
            self.classes = heads.head_class_map("classes", student, teacher)

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights) if self.two_stage else []

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if not self.weights:
            return {}
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        for x, y in self._matrices(student, teacher):
            if "classes.inter" in self.weights:
                shares["classes.inter"].append(self._share(correlations(x, y), len(x)))
            if "classes.intra" in self.weights:
                everywhere = self.normalizer == "global"
                columns = self._share(column_correlations(x, y, everywhere), x.shape[1])
                shares["classes.intra"].append(columns if len(x) or everywhere else (x.sum(), columns[1]))
        return self.average({term: base.summed(levels) for term, levels in shares.items()})

    def _share(self, coefficients: Tensor, count: int) -> SumAndCount:
        return base.sum_and_size(self.temperature**2 * (1 - coefficients).sum(), count)

    def _matrices(self, student: View, teacher: View) -> list[tuple[Tensor, Tensor]]:
        """Probabilities (R, K) of both models."""
        if self.two_stage:
            outputs = heads.region_outputs("classes", student, teacher, student.rois, self.classes)
            pair = outputs.student_logits, outputs.teacher_logits.detach()
            first, second = (
                self.classes.covered(F.softmax(upcast(logits) / self.temperature, dim=1)) for logits in pair
            )
            return [(first, second)]
        maps = heads.class_maps("classes", student, teacher, self.classes)
        return [(self._cells(x), self._cells(y)) for x, y in maps]

    def _cells(self, logits: Tensor) -> Tensor:
        """(B, A*K, H, W) -> (B*H*W, A*K)."""
        return (logits / self.temperature).sigmoid().permute(0, 2, 3, 1).flatten(0, 2)
