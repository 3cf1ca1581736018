"""DeFeat: distil objects and background separately, each with its own weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import base, heads, masks
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.heads import ClassMap
from distill.losses.imitation import MapImitation, mask_parts
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
    """Indicators (R,) of ``positive``, ``negative`` and ``all`` regions, from labels (r,) per image, 0 = background.

    With one seed per image, its negatives are subsampled at random to the number of its positives.
    """
    positive = torch.cat(list(labels)) > 0
    negative = ~positive
    if seeds is not None:
        negative = torch.cat([_subsample(own == 0, seed) for own, seed in zip(labels, seeds, strict=True)])
    return {"positive": positive, "negative": negative, "all": positive | negative}


def _subsample(negative: Tensor, seed: int) -> Tensor:
    """As many of an image's negatives (r,) as it has positives, drawn at random."""
    generator = torch.Generator(negative.device).manual_seed(seed)
    draw = torch.rand(negative.shape, generator=generator, device=negative.device)
    rank = draw.masked_fill(~negative, 2.0).argsort().argsort()
    return negative & (rank < (~negative).sum())


class DeFeat(DistillLoss):
    """Imitate objects and background of feature maps separately, and the scores of positive and negative regions too.

    ::

        neck.foreground     = 1/L sum_l  sum M_l (A_l(S_l) - T_l)^2 / max(1, 2 sum M_l)      sums over n, c, h, w
        neck.background     = the same with 1 - M_l
        backbone.*          = the same over stages, with one mask of all boxes at the neck's finest stride
        proposals.positive  = tau^2 / N_pos sum_i KL(softmax(z_t / tau) || softmax(z_s / tau))   i positive
        proposals.negative, proposals.all    = the same over negative or all regions, each with its own tau

    Source: Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475. Masks, sums
    and adapters follow its released code (ggjy/DeFeat.pytorch), with the level rule's constant of 56 for RetinaNet too.

    Where we differ: regions have the labels that the sampler gave to *them* (the released code pairs the teacher's
    regions with the labels of the student's); each group has its own temperature (the released code ignores one of
    the temperatures); RetinaNet works; counts are summed over all processes (``normalizer="process"`` for the
    original). Where the teacher knows more classes, its softmax is over the student's classes and background.

    Shapes: maps (B, C, H, W), logits (R, K+1). The paper's weights: COCO neck 4 and 16, VOC 3 and 12 (released);
    proposals 0.05 at temperature 3 and 2 at temperature 1. The paper gives no weights for the backbone.

    Args:
        student, teacher: specs of both detectors.
        neck: weights of its terms; ``levels``: strides, None for all that both models have. The level rule uses these.
        backbone: weights of its terms; ``levels``: strides of its stages, C3 to C5 by default.
        proposals: weights and temperatures of its terms, for two-stage detectors; ``source``: whose sampled regions,
            ``teacher`` or ``student``; ``subsample_negatives``: as many negatives as positives in each image.
        mask: options of :class:`distill.losses.masks.Mask`. With kind ``none`` every cell is foreground and there are
            no background terms: the paper's baseline that does not decouple.
        adapter: ``kernel`` and ``start`` of :func:`distill.losses.adapters.adapter`; a ReLU for each place.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` and the subsampling draw from the seed.
    """

    classes: ClassMap

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
        places = {
            "neck": base.merge_options("neck", neck, NECK),
            "backbone": base.merge_options("backbone", backbone, BACKBONE),
        }
        proposals = base.merge_options("proposals", proposals, PROPOSALS)
        self.mask = masks.Mask(**base.merge_options("mask", mask, MASK))
        parts = ("foreground",) if self.mask.kind == "none" else ("foreground", "background")
        weights = {f"{place}.{part}": options[part] for place, options in places.items() for part in parts}
        weights |= {f"proposals.{group}": proposals[group] for group in ("positive", "negative", "all")}
        super().__init__(weights, ramp, normalizer, seed)

        adapter = base.merge_options("adapter", adapter, ADAPTER)
        channels = {"neck": (student.neck, teacher.neck), "backbone": (student.body, teacher.body)}
        self.maps = nn.ModuleDict()
        for place, pair in channels.items():
            if self.terms(place):
                own = {"kernel": adapter["kernel"], "start": adapter["start"], "relu": adapter[f"{place}_relu"]}
                self.maps[place] = MapImitation(place, *pair, places[place]["levels"], own, seed=seed)

        self.source, self.subsample = proposals["source"], bool(proposals["subsample_negatives"])
        self.temperatures = {group: float(proposals[f"temperature_{group}"]) for group in self.terms("proposals")}
        if self.temperatures:
            self._validate_proposals(student, teacher)
            self.classes = ClassMap("proposals", student, teacher, partial=True)

    def _validate_proposals(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        base.require_outputs("proposals", student, teacher, "rois", "roi_logits")
        if self.source not in ("teacher", "student"):
            raise DistillError(f"proposals.source: expected teacher or student, got '{self.source}'")
        if not all(0 < value < math.inf for value in self.temperatures.values()):
            raise DistillError(f"proposals: expected temperatures above 0, got {self.temperatures}")

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        return [term for term in self.weights if term.startswith("proposals") or self.mask.reads_boxes]

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. Stages that no term needs are not read."""
        shares: dict[str, list[SumAndCount]] = {}
        seeds = self.seeds(student.batch.ids)
        for place, imitation in self.maps.items():
            assert isinstance(imitation, MapImitation)
            if place == "neck":
                shares |= imitation.compare_necks(student, teacher, self.mask, seeds, self.terms(place))
            else:
                mask = self.mask.on_stages(student, imitation.sizes(student.body), seeds)
                shares |= imitation(student.body, teacher.body, mask_parts(mask, self.terms(place)))
        if self.temperatures:
            shares |= self._compare_proposals(student, teacher)
        return self.average(shares)

    def _compare_proposals(self, student: View, teacher: View) -> dict[str, list[SumAndCount]]:
        """Shares of the terms of ``proposals``."""
        regions = (teacher if self.source == "teacher" else student).rois
        outputs = heads.region_outputs("proposals", student, teacher, regions, self.classes)
        members = groups(regions.labels, self.seeds(student.batch.ids) if self.subsample else None)
        shares: dict[str, list[SumAndCount]] = {}
        for group, temperature in self.temperatures.items():
            divergence = heads.kl_divergence(outputs.student_logits, outputs.teacher_logits, temperature)
            shares[f"proposals.{group}"] = [base.sum_and_count(divergence, members[group])]
        return shares
