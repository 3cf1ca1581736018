"""FGD: imitate objects and background apart, by the teacher's attention, and the relation of each cell to the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distill.losses import base, masks
from distill.losses.attention import channel_attention, spatial_attention
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.context import GlobalContext
from distill.losses.imitation import NeckPairs
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Size, View

NECK = {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7, "levels": 4}
ADAPTER = {"kernel": "auto", "start": "default", "relu": False}
BOX_SCALES = ("padded", "image")


def attended_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """sum_c A^S(T) A^C(T) (T - S)^2; maps (B, C, H, W) -> (B, H, W)."""
    weighted = (teacher - student).square() * channel_attention(teacher, temperature)[:, :, None, None]
    return spatial_attention(teacher, temperature) * weighted.sum(1)


def attention_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """sum_c ``|A^C(T) - A^C(S)|`` + sum_hw ``|A^S(T) - A^S(S)|`` of each image; maps (B, C, H, W) -> (B,)."""
    of_channels = channel_attention(teacher, temperature) - channel_attention(student, temperature)
    of_cells = spatial_attention(teacher, temperature) - spatial_attention(student, temperature)
    return of_channels.abs().sum(1) + of_cells.abs().sum((1, 2))


class FGD(DistillLoss):
    """Imitate objects and background apart, weighed by the teacher's attention; the attention; the global context.

    ::

        neck.foreground = sum_l 1/B sum M A^S(T) A^C(T) (T - S)^2         sums over n, c, h, w; S after its adapter
        neck.background = the same with B in place of M
        neck.attention  = sum_l 1/B (sum |A^C(T) - A^C(S)| + sum |A^S(T) - A^S(S)|)
        neck.relation   = sum_l 1/B sum (R_t(T) - R_s(S))^2
        A^S = H W softmax_hw(mean_c |F| / tau),    A^C = C softmax_c(mean_hw |F| / tau)
        M   = the largest 1 / (number of cells of a box) over the boxes that cover a cell; every level has all boxes
        B   = 1 / (number of cells without a box, per image) on the cells without a box

    R_t and R_s are context blocks of GCNet (`distill.losses.context`), one pair for each level; both are trained. A box
    covers the cells from floor(x1 W / w) to ceil(x2 W / w), inclusive, and its number of cells is not clipped.

    Source: Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, "Focal and Global Knowledge Distillation for Detectors", CVPR 2022,
    arXiv 2111.11837, and its released code.

    Where we differ: w and h are the size of the padded image, because W and H are the size of the padded map. The
    released code uses the size before padding (here ``boxes=image``), which stretches the boxes of padded images. B is
    counted over all processes.

    Shapes: maps (B, C, H, W). Published weights (foreground, background, attention, relation): two-stage 5e-5, 2.5e-5,
    5e-5, 5e-7 on the four finest levels; RetinaNet 1e-3, 5e-4, 5e-4 (code) or 1e-3 (paper), 5e-6 on all levels; FCOS
    1.6e-3, 8e-4, 8e-4, 8e-6 with tau = 0.8; otherwise tau = 0.5. Gradients are clipped at a norm of 35; neck and head
    are inherited where the architectures are equal (``init=inherit``).

    Args:
        student, teacher: specs of both detectors.
        neck: weights of its terms; ``levels``: strides, or a number of the finest shared levels, None for all.
        temperature: tau.
        boxes: the size that scales boxes to cells: ``padded`` or ``image`` (the released code).
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        temperature: float = 0.5,
        boxes: str = "padded",
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({f"neck.{term}": neck[term] for term in NECK if term != "levels"}, ramp, normalizer, seed)
        if boxes not in BOX_SCALES:
            raise DistillError(f"boxes: expected {' or '.join(BOX_SCALES)}, got '{boxes}'")
        self.temperature, self.of_padded = base.check_temperature("temperature", temperature), boxes == "padded"
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.neck: NeckPairs | None = None
        self.contexts: Any = nn.ModuleDict()
        if not self.weights:
            return
        self.neck = NeckPairs(student, teacher, neck["levels"], adapter, seed)
        if "neck.relation" in self.weights:
            for role in ("student", "teacher"):
                seeds = {level: base.derive_seed(seed, "context", role, level) for level in self.neck.levels}
                self.contexts[role] = nn.ModuleDict(
                    {str(level): GlobalContext(teacher.neck[level], seed=own) for level, own in seeds.items()}
                )

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [term for term in ("neck.foreground", "neck.background") if term in self.weights]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if self.neck is None:
            return {}
        shares: dict[str, list[SumAndCount]] = {term: [] for term in self.weights}
        for level, (student_map, teacher_map) in zip(self.neck.levels, self.neck(student, teacher), strict=True):
            for term, total in self._compare(student, level, student_map, teacher_map).items():
                shares[term].append(base.sum_and_size(total, len(student_map)))
        return self.average({term: base.summed(levels) for term, levels in shares.items()})

    def _compare(self, view: View, level: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Sums over the images of the terms at one level."""
        sums = {}
        if {"neck.foreground", "neck.background"} & self.weights.keys():
            inside = self._objects(view, masks.map_size(teacher))
            outside = (inside == 0).float()
            outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
            error = attended_error(student, teacher, self.temperature)
            sums = {"neck.foreground": (inside * error).sum(), "neck.background": (outside * error).sum()}
        if "neck.attention" in self.weights:
            sums["neck.attention"] = attention_error(student, teacher, self.temperature).sum()
        if "neck.relation" in self.weights:
            own, other = (
                upcast(self.contexts[role][str(level)](x)) for role, x in (("student", student), ("teacher", teacher))
            )
            # `squared_error` would pass no gradient to the teacher's block.
            sums["neck.relation"] = (other - own).square().sum()
        return {term: total for term, total in sums.items() if term in self.weights}

    def _objects(self, view: View, cells: Size) -> Tensor:
        """M, (B, H, W)."""
        boxes = [target.boxes for target in view.batch.targets]
        padded = masks.map_size(view.batch.images)
        sizes = [padded] * len(boxes) if self.of_padded else view.batch.sizes
        return masks.inverse_areas(boxes, sizes, cells)
