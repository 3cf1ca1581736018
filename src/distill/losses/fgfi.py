"""FGFI: imitate the cells near objects, selected by their anchors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.losses import base, masks
from distill.losses.base import DistillLoss
from distill.losses.imitation import MapImitation
from distill.types import DetectorSpec, View, require

NECK = {"foreground": 4.0, "levels": None}
MASK = {"kind": "fine_grained", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 3, "start": "defeat", "relu": False}


class FGFI(DistillLoss):
    """Imitate the cells of feature maps whose anchors overlap an object nearly as well as the object's best anchor.

    ::

        I_l = 1 where any anchor of the cell has IoU(anchor, box) > psi max IoU(., box), for any box; psi = 0.5
        neck.foreground = 1/L sum_l  sum I_l |A_l(S_l) - T_l|^2 / max(1, n sum I_l)       sums over images and cells

    with ``|.|^2`` summed over channels and n = 2 (``half_l2``, the original), 2 C (``half_mse``, the reruns) or C
    (``mse``). The original weight of 0.01 corresponds to 0.01 C in the form of the reruns, 2.56 for 256 channels.

    Source: Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609,
    from its released code (twangnh/Distilling-Object-Detectors); we did not have the text of the paper.

    Where we differ: the original has a single map. For a pyramid its authors say that a box belongs to one level, but
    not to which one: ``fine_grained`` takes DeFeat's level rule and the best anchor of that level;
    ``fine_grained_all_levels`` (the rerun of Zheng et al., CVPR 2022) has no level rule and takes the best anchor of
    all levels. The value is the mean over levels, as in DeFeat's rerun. An image without boxes adds 0, where the
    original divides by zero. IoU has no "+1", unlike the original. The original leaves out the first 400 steps (1.28
    epochs of VOC2007 at batch 16); ``ramp.warmup`` rises linearly instead.

    Shapes: maps (B, C, H, W), masks (B, H, W). Weights: 0.01 (original, VOC07 and VGG); 4 on COCO and 3 on VOC in
    DeFeat's reruns, whose adapter has no ReLU.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, None for all that both models have. The level rule uses these.
        mask: options of :class:`distill.losses.masks.Mask`, of any kind.
        normalization: ``half_mse``, ``half_l2`` or ``mse``.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        mask: Mapping[str, Any] = MASK,
        normalization: str = "half_mse",
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        super().__init__({"neck.foreground": neck["foreground"]}, ramp, normalizer, seed)
        self.mask = masks.Mask(**base.merge_options("mask", mask, MASK))
        self.maps: MapImitation | None = None
        if self.weights:
            if student.neck and self.mask.kind.startswith("fine_grained"):
                require(student, "anchors", "mask", "student", "Set mask.kind=ground_truth")
            adapter = base.merge_options("adapter", adapter, ADAPTER)
            self.maps = MapImitation(
                "neck", student.neck, teacher.neck, neck["levels"], adapter, normalization=normalization, seed=seed
            )

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights) if self.mask.reads_boxes else []

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """``neck.foreground``, a scalar."""
        if self.maps is None:
            return {}
        seeds = self.seeds(student.batch.ids)
        return self.average(self.maps.compare_necks(student, teacher, self.mask, seeds, self.terms("neck")))
