"""FGFI: imitate the cells near objects, as anchors see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distill.losses import base, masks
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import ADAPTER, MapImitation, parts
from distill.types import DetectorSpec, View

NECK = {"foreground": 4.0, "levels": None}
MASK = {"kind": "fine_grained", "scale": 56.0, "threshold": 0.5}


class FGFI(DistillLoss):
    """Imitate the cells of feature maps whose anchors overlap an object nearly as well as its best anchor does.

    ::

        I_l = 1 where any anchor of the cell has IoU(anchor, box) > psi max IoU(., box), for any box; psi = 0.5
        neck.foreground = 1/L sum_l  sum I_l |A_l(S_l) - T_l|^2 / max(1, n sum I_l)       sums over images and cells

    with ``|.|^2`` summed over channels and n = 2 (``half_l2``, the original), 2 C (``half_mse``, the reruns) or C (``mse``):
    the weight 0.01 of the original is 0.01 C in the form of the reruns, 2.56 for 256 channels.

    Source: Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609,
    by its released code (twangnh/Distilling-Object-Detectors); the paper's own text was not at hand.

    Where we differ: the original has a single map. For a pyramid its authors say only that a box belongs to one level,
    not to which; ``fine_grained`` takes DeFeat's rule and its best anchor on that level, ``fine_grained_all_levels``
    (the rerun of Zheng et al., CVPR 2022) has no rule and compares with the anchors of all levels. The value is the mean
    over levels, as in DeFeat's rerun. An image without boxes costs nothing, where the original divides by zero. IoU is
    without the "+1" of the original. It leaves the first 400 steps out (1.28 epochs of VOC2007 at batch 16), where
    ``ramp.warmup`` rises linearly.

    Shapes: maps (B, C, H, W), masks (B, H, W). Weights: 0.01 (original, VOC07 and VGG); 4 on COCO and 3 on VOC in the
    reruns of DeFeat, whose adapter has no ReLU.

    Args:
        student, teacher: specs of both detectors.
        neck: weight of its term; ``levels``: strides, None for all that both have. The level rule runs over these.
        mask: options of :class:`distill.losses.masks.Mask`, of any kind.
        normalization: ``half_mse``, ``half_l2`` or ``mse``.
        adapter: ``kernel`` 1, 3, ``auto`` or None, ``start`` values (see `distill.losses.adapters`), ``relu`` after it.
        ramp, normalizer, seed: see :class:`DistillLoss`. The draws are those of the mask ``random``.
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
        maps = base.options("neck", neck, NECK)
        super().__init__({"neck.foreground": maps["foreground"]}, ramp, normalizer, seed)
        self.mask = masks.Mask(**base.options("mask", mask, MASK))
        self.maps = nn.ModuleDict()
        if self.weights:
            self.maps["neck"] = MapImitation(
                "neck", student.neck, teacher.neck, maps["levels"], adapter, count=normalization, seed=seed
            )

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """``neck.foreground``, a scalar."""
        shares: dict[str, list[SumAndCount]] = {}
        for imitation in self.maps.values():
            assert isinstance(imitation, MapImitation)
            inside = self.mask(student, imitation.sizes(student.neck), self.seeds(student.batch.ids))
            shares |= imitation(student.neck, teacher.neck, parts(inside, ["foreground"]))
        return self.average(shares)
