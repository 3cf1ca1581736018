"""SSIM distillation: imitate the local luminance, contrast and structure of the teacher's maps, not single cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.losses import base, masks
from distill.losses.base import DistillLoss
from distill.losses.imitation import MapImitation
from distill.losses.similarity import Dissimilarity
from distill.types import DetectorSpec, DistillError, View

NECK = {"foreground": 4.0, "background": 0.0, "levels": None}
WINDOW = {"size": 11, "sigma": 1.5}
EXPONENTS = {"luminance": 1.0, "contrast": 1.0, "structure": 1.0}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}


class SSIM(DistillLoss):
    """Compare the neck's maps by their local luminance, contrast and structure instead of cell by cell.

    ::

        neck.foreground = sum_l  1/N_l sum e(psi(A_l(S_l)), psi(T_l))      sum over n, c, h, w; N_l = B C H_l W_l
        e   = (1 - l^alpha c^beta s^gamma) / 2, for each channel and cell
        l   = (2 mu_S mu_T + C1) / (mu_S^2 + mu_T^2 + C1)
        c   = (2 sd_S sd_T + C2) / (sd_S^2 + sd_T^2 + C2)
        s   = (cov_ST + C3) / (sd_S sd_T + C3)              C1 = 0.01^2, C2 = 0.03^2, C3 = C2 / 2
        psi = (x - min) / (max - min + 1e-6), of each plane

    with population moments in a Gaussian window of 11 x 11 cells, sigma 1.5; A_l is a 1 x 1 convolution.

    Source: de Rijk, Schneider, Cordts, Gavrila, "Structural Knowledge Distillation for Object Detection", NeurIPS 2022,
    arXiv 2211.13133, known to us second-hand (its abstract and readings of it); there is no public code. The local loss
    equals ``kornia.losses.ssim_loss`` with its reflect padding, on which the paper is said to rest.

    Where we differ, or had to choose: the paper does not state the scope of psi; ours is a plane, as in kornia, and
    a flat plane passes no gradient. A map with a side below 6 cells, which kornia refuses, is reflected repeatedly. A
    plane of a single cell has nothing to compare, and gives 0. With a mask, the mean of each level is over the cells of
    the part, and windows reach across its border. Counts are summed over all processes.

    Shapes: maps (B, C, H, W). The paper's weight is an open point: one source reports one lambda for both of its
    detectors, best at 2 or 4; our default is 4. No weight is reported for a mask.

    Args:
        student, teacher: specs of both detectors.
        neck: weights of its terms; ``levels``: strides, None for all that both models have.
        error: ``ssim``, or the alternatives that the paper compares in the same frame: ``l1``, ``l2``.
        window: its ``size``, odd, and ``sigma``, in cells.
        exponents: of ``luminance`` (alpha), ``contrast`` (beta) and ``structure`` (gamma); 0 leaves a factor out.
        normalize: the scope of one minimum and maximum: ``plane``, ``image``, ``tensor`` (of this process), ``none``.
        mask: options of :class:`distill.losses.masks.Mask`. With kind ``none``, the paper's, the whole map is
            foreground, and there is no background term.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`. Without an adapter the
            paper lost 1.1 AP between different architectures, and nothing between depths of one architecture.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        error: str = "ssim",
        window: Mapping[str, Any] = WINDOW,
        exponents: Mapping[str, float] = EXPONENTS,
        normalize: str = "plane",
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        neck = base.merge_options("neck", neck, NECK)
        self.mask = masks.Mask(**base.merge_options("mask", mask, MASK))
        parts = ("foreground",) if self.mask.kind == "none" else ("foreground", "background")
        if self.mask.kind == "none" and neck["background"]:
            raise DistillError(
                f"neck.background={neck['background']}: without a mask the whole map is foreground. Set mask.kind, as "
                "in distill=ssim_masked, or neck.background=0"
            )
        super().__init__({f"neck.{part}": neck[part] for part in parts}, ramp, normalizer, seed)
        options = base.merge_options("window", window, WINDOW) | base.merge_options("exponents", exponents, EXPONENTS)
        dissimilarity = Dissimilarity(error, normalize, **options)
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.maps: MapImitation | None = None
        if self.weights:
            self.maps = MapImitation(
                "neck",
                student.neck,
                teacher.neck,
                neck["levels"],
                adapter,
                dissimilarity,
                normalization="mse",
                over_levels="sum",
                seed=seed,
            )

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return list(self.weights) if self.mask.reads_boxes else []

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars."""
        if self.maps is None:
            return {}
        seeds = self.seeds(student.batch.ids)
        return self.average(self.maps.compare_necks(student, teacher, self.mask, seeds, self.terms("neck")))
