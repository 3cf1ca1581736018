"""DeFeat: distil objects and background apart, each with a weight of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import base, masks
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import MapImitation, parts
from distill.types import DetectorSpec, DistillError, View

NECK = {"foreground": 4.0, "background": 16.0, "levels": None}
BACKBONE = {"foreground": 0.0, "background": 0.0, "levels": (8, 16, 32)}
PROPOSALS = {
    "positive": 0.0,
    "negative": 0.0,
    "all": 0.0,
    "temperature_positive": 3.0,
    "temperature_negative": 1.0,
    "temperature_all": 1.0,
    "source": "teacher",
    "subsample_negatives": False,
}
ADAPTER = {"kernel": 3, "start": "defeat", "neck_relu": False, "backbone_relu": True}
MASK = {"kind": "ground_truth", "scale": 56.0, "threshold": 0.5}


def groups(labels: Sequence[Tensor], seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
    """``positive``, ``negative`` and ``all`` regions, as indicators (R,), of labels (r,) per image, 0 = background.

    With one seed per image, its negatives are thinned at random to the number of its positives.
    """
    positive = torch.cat(list(labels)) > 0
    negative = ~positive
    if seeds is not None:
        negative = torch.cat([_thinned(each == 0, seed) for each, seed in zip(labels, seeds, strict=True)])
    return {"positive": positive, "negative": negative, "all": positive | negative}


def _thinned(negative: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(negative.device).manual_seed(seed)
    draw = torch.rand(negative.shape, generator=generator, device=negative.device)
    rank = draw.masked_fill(~negative, 2.0).argsort().argsort()
    return negative & (rank < (~negative).sum())


class DeFeat(DistillLoss):
    """Imitate object and background cells of feature maps, and the scores of positive and negative regions, apart.

    ::

        neck.foreground     = 1/L sum_l  sum M_l (A_l(S_l) - T_l)^2 / max(1, 2 sum M_l)      sums over n, c, h, w
        neck.background     = the same with 1 - M_l
        backbone.*          = the same over stages, with one mask of all boxes at the neck's finest stride
        proposals.positive  = tau^2 / N_pos sum_i KL(softmax(z_t / tau) || softmax(z_s / tau))   i positive
        proposals.negative, proposals.all    = likewise over negative or all regions, each with its own tau

    Source: Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475; masks, sums
    and adapters as in its released code (ggjy/DeFeat.pytorch), the level rule's constant 56 for RetinaNet too.

    Where we differ: regions carry the labels that the sampler gave to *them* (the released code lines up the teacher's
    regions with the labels of the student's), each group has its own temperature (there one is never read), RetinaNet
    works, and counts run over all processes (``normalizer="process"`` for the original). Where the teacher knows more
    classes, its softmax is over the student's classes and background.

    Shapes: maps (B, C, H, W), logits (R, K+1). The paper's weights: COCO neck 4 and 16, VOC 3 and 12 (released);
    proposals 0.05 at temperature 3 and 2 at temperature 1. It gives no weights for the backbone.

    Args:
        student, teacher: specs of both detectors.
        neck: weights of its terms; ``levels``: strides, None for all that both have. The level rule runs over these.
        backbone: weights of its terms; ``levels``: strides of its stages, C3 to C5 by default.
        proposals: weights and temperatures of its terms, for two-stage detectors; ``source``: whose sampled regions,
            ``teacher`` or ``student``; ``subsample_negatives``: per image, as many as it has positives.
        mask: options of :class:`distill.losses.masks.Mask`. With kind ``none`` every cell is foreground, so the background
            terms vanish: the baseline that does not decouple.
        adapter: ``kernel`` 1, 3, ``auto`` or None, ``start`` values (see `distill.losses.adapters`), ReLU after it per place.
        ramp, normalizer, seed: see :class:`DistillLoss`. The draws are those of ``random`` and of the subsampling.
    """

    columns: Tensor | None

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        neck: Mapping[str, Any] = NECK,
        backbone: Mapping[str, Any] = BACKBONE,
        proposals: Mapping[str, Any] = PROPOSALS,
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        maps = {"neck": base.options("neck", neck, NECK), "backbone": base.options("backbone", backbone, BACKBONE)}
        self.mask = masks.Mask(**base.options("mask", mask, MASK))
        regions = ("foreground",) if self.mask.kind == "none" else ("foreground", "background")
        weights = {f"{place}.{region}": options[region] for place, options in maps.items() for region in regions}
        chosen = base.options("proposals", proposals, PROPOSALS)
        weights |= {f"proposals.{group}": chosen[group] for group in ("positive", "negative", "all")}
        super().__init__(weights, ramp, normalizer, seed)

        how = base.options("adapter", adapter, ADAPTER)
        channels = {"neck": (student.neck, teacher.neck), "backbone": (student.body, teacher.body)}
        self.maps = nn.ModuleDict()
        for place, (ours, theirs) in channels.items():
            if self.terms(place):
                own = {"kernel": how["kernel"], "start": how["start"], "relu": how[f"{place}_relu"]}
                self.maps[place] = MapImitation(place, ours, theirs, maps[place]["levels"], own, seed=seed)

        self.source, self.subsample = chosen["source"], bool(chosen["subsample_negatives"])
        self.temperatures = {group: float(chosen[f"temperature_{group}"]) for group in self.terms("proposals")}
        columns = self._check_proposals(student, teacher) if self.temperatures else None
        self.register_buffer("columns", columns, persistent=False)

    def _check_proposals(self, student: DetectorSpec, teacher: DetectorSpec) -> Tensor | None:
        """The teacher's columns of the student's classes; None where the lists are equal."""
        base.require_outputs("proposals", student, teacher, "rois", "roi_logits")
        if self.source not in ("teacher", "student"):
            raise DistillError(f"proposals.source: expected teacher or student, got '{self.source}'")
        if not all(0 < value < math.inf for value in self.temperatures.values()):
            raise DistillError(f"proposals: expected temperatures above 0, got {self.temperatures}")
        return base.class_columns("proposals", student, teacher)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. A stage that no term needs is not read."""
        shares: dict[str, list[SumAndCount]] = {}
        seeds = self.seeds(student.batch.ids)
        for place, imitation in self.maps.items():
            assert isinstance(imitation, MapImitation)
            ours, theirs = (student.neck, teacher.neck) if place == "neck" else (student.body, teacher.body)
            build = self.mask if place == "neck" else self.mask.on_stages
            shares |= imitation(ours, theirs, parts(build(student, imitation.sizes(ours), seeds), self.terms(place)))
        if self.temperatures:
            shares |= self._compare(student, teacher)
        return self.average(shares)

    def _compare(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """One share for each term on proposals."""
        regions = (teacher if self.source == "teacher" else student).rois
        ours, theirs = student.roi_logits(regions.boxes)[0], teacher.roi_logits(regions.boxes)[0]
        theirs = theirs if self.columns is None else theirs[:, self.columns]
        base.check_shapes("proposals, logits (R, K+1)", ours, theirs, "Build the loss with the specs of both detectors")
        members = groups(regions.labels, self.seeds(student.batch.ids) if self.subsample else None)
        shares: dict[str, list[SumAndCount]] = {}
        for group, temperature in self.temperatures.items():
            total = (members[group] * base.divergence(ours, theirs, temperature)).sum()
            shares[f"proposals.{group}"] = [(total, members[group].sum())]
        return shares
