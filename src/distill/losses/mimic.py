"""Mimic: imitate the teacher's features, in regions or on the whole neck."""

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
    """Imitate the neck's features pooled in the student's regions, or the whole neck.

    ::

        regions.all = 1/N sum_i 1/2 mean (A(s_i) - t_i)^2             features of region i pooled from both necks
        neck.all    = 1/L sum_l 1/2 mean (A_l(S_l) - T_l)^2           means over elements

    Source of ``regions``: Li, Jin and Yan, "Mimicking Very Efficient Network for Object Detection", CVPR 2017. There is
    no released code, and the equation is recalled, not checked against the text:
    ``L = lambda / 2N sum_i |t_i - r(s_i)|^2 / m_i`` over N = 256 regions that the student's RPN proposes, with r a 1x1
    convolution and m_i the size of t_i. Later comparisons (DeFeat's table for VOC among them) use the name Mimic for
    the term ``neck``.

    Where we differ: RoIAlign pools regions to 7x7, from the level that each detector's own rule selects. The default
    regions are those from which the box head learns, so that the student pools once. One-stage detectors have no
    proposals: their best predictions of any score are the regions (``kind="predictions"``). The paper's half-size
    images and its second stage, where the student's head imitates the teacher's outputs, are left out: we know neither
    the form nor the weight of the second stage.

    Shapes: pooled features (R, C, 7, 7), maps (B, C, H, W). The paper's weight is not known to us; 1 is a choice.

    Args:
        student, teacher: specs of both detectors.
        regions: weight of its term; ``source``: whose regions, ``student`` or ``teacher``; ``kind``: ``rois`` (sampled,
            with the ground truth added), ``proposals`` or ``predictions``, of which the best ``top`` of an image count.
        neck: weight of its term; ``levels``: strides, None for all that both models have; ``normalization``:
            ``half_mse``, ``mse`` or ``half_l2`` (see `distill.losses.imitation`).
        mask: options of :class:`distill.losses.masks.Mask`, for ``neck``; kind ``none`` is the whole neck.
        adapter: ``kernel``, ``start`` and ``relu`` of :func:`distill.losses.adapters.adapter`.
        ramp, normalizer, seed: see :class:`DistillLoss`. The mask ``random`` draws from the seed.
    """

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
        regions, neck = base.merge_options("regions", regions, REGIONS), base.merge_options("neck", neck, NECK)
        super().__init__({"regions.all": regions["all"], "neck.all": neck["all"]}, ramp, normalizer, seed)
        adapter = base.merge_options("adapter", adapter, ADAPTER)
        self.mask = base.build_mask("neck", bool(self.terms("neck")), mask, MASK)
        self.regions: RegionImitation | None = None
        self.maps: MapImitation | None = None
        if self.terms("regions"):
            self.source, self.kind, self.top = regions["source"], regions["kind"], regions["top"]
            self._validate_regions(student, teacher)
            channels = _pooled_channels("student", student), _pooled_channels("teacher", teacher)
            self.regions = RegionImitation("regions", *channels, adapter, seed)
        if self.terms("neck"):
            normalization = neck["normalization"]
            self.maps = MapImitation(
                "neck", student.neck, teacher.neck, neck["levels"], adapter, normalization=normalization, seed=seed
            )

    def _validate_regions(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
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

    @property
    def truth_terms(self) -> list[str]:
        """See the base class."""
        regions = ["regions.all"] if self.regions is not None and self.kind == "rois" else []
        return regions + (["neck.all"] if self.maps is not None and self.mask.reads_boxes else [])

    def forward(self, student: View, teacher: View) -> dict[str, Tensor]:
        """The terms of `weights`, scalars. Stages that no term needs are not read."""
        shares: dict[str, list[SumAndCount]] = {}
        if self.regions is not None:
            boxes = self._boxes(student if self.source == "student" else teacher)
            shares["regions.all"] = [self.regions(student.roi_features(boxes), teacher.roi_features(boxes))]
        if self.maps is not None:
            seeds = self.seeds(student.batch.ids)
            shares |= self.maps.compare_necks(student, teacher, self.mask, seeds, self.terms("neck"))
        return self.average(shares)

    def _boxes(self, view: View) -> list[Tensor]:
        """Boxes per image of the regions."""
        if self.kind == "rois":
            return view.rois.boxes
        if self.kind == "proposals":
            return [boxes[: self.top] for boxes in view.proposals]
        return [predicted.boxes.detach() for predicted in view.predictions(score=0.0, top=self.top)]


def _pooled_channels(role: str, spec: DetectorSpec) -> int:
    """Channels of a region's features, whatever level they are pooled from."""
    channels = set(spec.neck.values())
    if len(channels) > 1:
        raise DistillError(
            f"regions: expected equally many channels on all levels of the {role}'s neck, got {spec.neck}. Set "
            "regions.all to 0, or choose another detector"
        )
    return channels.pop()
