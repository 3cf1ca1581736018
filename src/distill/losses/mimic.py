"""Mimic: make the student's features like the teacher's, in regions or everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.losses import base
from distill.losses.base import DistillLoss, SumAndCount
from distill.losses.imitation import MapImitation, RegionImitation
from distill.types import DetectorSpec, DistillError, View, require

REGIONS = {"all": 1.0, "source": "student", "kind": "rois", "top": 256}
NECK = {"all": 0.0, "levels": None, "normalization": "half_mse"}
MASK = {"kind": "none", "scale": 56.0, "threshold": 0.5}
ADAPTER = {"kernel": 1, "start": "default", "relu": False}
KINDS = ("rois", "proposals", "predictions")


class Mimic(DistillLoss):
    """Imitate what the student's regions hold of the neck, or the whole neck.

    ::

        regions.all = 1/N sum_i 1/2 mean (A(s_i) - t_i)^2             features of region i pooled from both necks
        neck.all    = 1/L sum_l 1/2 mean (A_l(S_l) - T_l)^2           means over elements

    Source of ``regions``: Li, Jin and Yan, "Mimicking Very Efficient Network for Object Detection", CVPR 2017. There is
    no released code, and the equation is recalled, not checked against the text: ``L = lambda / 2N sum_i |t_i - r(s_i)|^2 / m_i``
    over N = 256 regions that the student's RPN proposes, with r a 1x1 convolution and m_i the size of t_i. Later comparisons (DeFeat's
    table for VOC among them) call ``neck`` by the name of Mimic.

    Where we differ: regions are pooled by RoIAlign, 7x7, from the level that each detector's own rule gives them; ours
    are those that the box head learns from, so that the student pools once. One-stage detectors propose nothing, so
    their best predictions of any score stand in (``kind="predictions"``). The paper's half-size images, and its second
    stage, where the student's head imitates the teacher's outputs, are left out: no form or weight of it is at hand.

    Shapes: pooled features (R, C, 7, 7), maps (B, C, H, W). The paper's weight is not known to us; 1 is a choice.

    Args:
        student, teacher: specs of both detectors.
        regions: weight of its term; ``source``: whose regions, ``student`` or ``teacher``; ``kind``: ``rois``, sampled
            with the ground truth added, ``proposals`` or ``predictions``, the best ``top`` of an image.
        neck: weight of its term; ``levels``: strides, None for all that both have; ``normalization``: ``half_mse``,
            ``mse`` or ``half_l2`` (see `distill.losses.imitation`).
        mask: options of :class:`distill.losses.masks.Mask`, for ``neck``; kind ``none`` is the whole neck.
        adapter: ``kernel`` 1, 3, ``auto`` or None, ``start`` values (see `distill.losses.adapters`), ``relu`` after it.
        ramp, normalizer, seed: see :class:`DistillLoss`. The draws are those of the mask ``random``.
    """

    regions: RegionImitation | None
    maps: MapImitation | None

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        regions: Mapping[str, Any] = REGIONS,
        neck: Mapping[str, Any] = NECK,
        mask: Mapping[str, Any] = MASK,
        adapter: Mapping[str, Any] = ADAPTER,
        ramp: Mapping[str, Any] = base.RAMP,
        normalizer: str = "global",
        seed: int = 0,
    ) -> None:
        pooled, maps = base.options("regions", regions, REGIONS), base.options("neck", neck, NECK)
        super().__init__({"regions.all": pooled["all"], "neck.all": maps["all"]}, ramp, normalizer, seed)
        how = base.options("adapter", adapter, ADAPTER)
        self.mask = base.check_mask("neck", bool(self.terms("neck")), mask, MASK)
        self.regions = self.maps = None
        if self.terms("regions"):
            self.source, self.kind, self.top = pooled["source"], pooled["kind"], pooled["top"]
            self._check_regions(student, teacher)
            ours, theirs = _channels("student", student), _channels("teacher", teacher)
            self.regions = RegionImitation("regions", ours, theirs, how, seed)
        if self.terms("neck"):
            self.maps = MapImitation(
                "neck", student.neck, teacher.neck, maps["levels"], how, count=maps["normalization"], seed=seed
            )

    def _check_regions(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        if self.source not in ("student", "teacher") or self.kind not in KINDS:
            raise DistillError(
                f"regions: expected the source student or teacher, and a kind of {', '.join(KINDS)}, got "
                f"source='{self.source}' and kind='{self.kind}'"
            )
        if not (isinstance(self.top, int) and self.top > 0):
            raise DistillError(f"regions.top: expected a number of regions an image, 1 or more, got {self.top}")
        base.require_outputs("regions", student, teacher, "roi_features")
        if self.kind != "predictions":
            spec = student if self.source == "student" else teacher
            remedy = "Set regions.kind=predictions, take the whole neck (distill=mimic_neck)"
            require(spec, "rois", f"regions.kind={self.kind}", self.source, remedy)

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. A stage that no term needs is not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.regions is not None:
            boxes = self._boxes(student if self.source == "student" else teacher)
            shares["regions.all"] = [self.regions(student.roi_features(boxes), teacher.roi_features(boxes))]
        if self.maps is not None:
            inside = self.mask(student, self.maps.sizes(student.neck), self.seeds(student.batch.ids))
            shares |= self.maps(student.neck, teacher.neck, {"all": inside})
        return self.average(shares)

    def _boxes(self, view: View) -> list[Tensor]:
        if self.kind == "rois":
            return view.rois.boxes
        if self.kind == "proposals":
            return [boxes[: self.top] for boxes in view.proposals]
        return [found.boxes.detach() for found in view.predictions(score=0.0, top=self.top)]


def _channels(who: str, spec: DetectorSpec) -> int:
    channels = set(spec.neck.values())
    if len(channels) > 1:
        raise DistillError(
            f"regions: expected equally many channels on all levels of the {who}'s neck, got {spec.neck}. Set "
            "regions.all to 0, or choose another detector"
        )
    return channels.pop()
