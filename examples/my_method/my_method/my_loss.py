"""The absolute difference between the feature maps of student and teacher."""

from __future__ import annotations

from torch import Tensor

from distill import DetectorSpec, DistillLoss
from distill.losses.adapters import adapters
from distill.losses.base import shared_levels
from distill.precision import upcast
from distill.types import View


class MyLoss(DistillLoss):
    """neck.all = sum over levels l and elements of |A_l(S_l) - T_l|, divided by the number of elements.

    A_l is a 1x1 convolution if the numbers of channels differ, otherwise nothing.

    Args:
        student: the student's spec.
        teacher: the teacher's spec.
        weight: weight of the term.
        seed: seed of the adapters' initial weights.
    """

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec, weight: float = 1.0, seed: int = 0) -> None:
        super().__init__({"neck.all": weight}, seed=seed)
        self.levels = shared_levels("neck", student.neck, teacher.neck, None)
        self.adapters = adapters(student.neck, teacher.neck, self.levels, kernel="auto", start="default", seed=seed)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """Return the unweighted term."""
        differences, elements = [], 0
        for level in self.levels:
            target = upcast(teacher.neck[level])
            adapted = upcast(self.adapters[str(level)](student.neck[level]))
            differences.append((adapted - target).abs().sum())
            elements += target.numel()
        total = sum(differences[1:], differences[0])
        return self.average({"neck.all": [(total, total.new_tensor(elements))]})
