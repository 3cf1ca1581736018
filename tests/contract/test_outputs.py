"""A detector declares its outputs once, in its spec. Detectors without neck, anchors and regions can be added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.detectors.base import Detector
from distill.detectors.registry import FAMILIES
from distill.detectors.view import LazyView, network
from distill.diagnostics.doctor import shapes
from distill.losses.chen import Chen
from distill.losses.defeat import DeFeat
from distill.losses.dsig import DSIG
from distill.losses.fgfi import FGFI
from distill.losses.mimic import Mimic
from distill.losses.ssim import SSIM
from distill.losses.tadf import TADF
from distill.teacher import Teacher
from distill.training.callbacks.term_check import GRADIENT_FACTOR, measure_terms
from distill.training.nonfinite import non_finite_levels
from distill.types import ALTERNATIVES, MAPS, Batch, DetectorSpec, DistillError, MissingOutputError, Target, require
from helpers.detectors import QUERY_FAMILIES, query_detector
from helpers.fake_view import spec as pyramid_spec

SMALL = {"backbone": {"depth": 10, "width": 0.25, "norm": "batch_fixed_stats"}, "neck_channels": 64}


class QueryView(LazyView):
    """A detector that answers queries over the last map of its backbone, as DETR does."""

    outputs = LazyView.outputs | {"queries"}

    @network
    def queries(self) -> Tensor:
        """(B, Q, C)."""
        memory = self.body[32].flatten(2).transpose(1, 2)
        answers: Tensor = self.net.decoder(self.net.queries.expand(len(memory), -1, -1), memory, memory)[0]
        return answers


class Stages(nn.Module):
    """Four convolutions, strides 4 to 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 4 if i == 0 else 2, 1) for i in range(4))

    def maps(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps[1:]


class QueryNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = nn.Module()
        self.backbone.body = Stages()
        self.queries = nn.Parameter(torch.randn(1, 5, 8))
        self.decoder = nn.MultiheadAttention(8, 2, batch_first=True)


class QueryDetector(Detector):
    family = "detr"
    view_class = QueryView

    def __init__(self) -> None:
        spec = DetectorSpec(
            family=self.family,
            outputs=QueryView.outputs,
            classes=("cat", "dog", "cow", "hen"),
            body=dict.fromkeys((4, 8, 16, 32), 8),
            neck={},
            anchors={},
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            norm="frozen",
        )
        super().__init__(QueryNetwork(), spec, {"pixels": {"channel_order": "rgb"}}, ())


def batch(height: int = 64) -> Batch:
    target = Target(torch.tensor([[4.0, 4.0, 40.0, 40.0]]), torch.tensor([1]))
    pixels = (torch.arange(3 * height * 96) * 37 % 251).to(torch.uint8).view(1, 3, height, 96)
    return Batch(pixels, ((height, 96),), ((height, 96),), (target,), (1,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_has_exactly_the_outputs_of_its_spec(family: str) -> None:
    kind: Any = FAMILIES[family]
    detector = query_detector(family) if family in QUERY_FAMILIES else kind(["cat", "dog"], **SMALL)
    view = detector.view(batch(96))
    assert view.spec.outputs <= {*ALTERNATIVES, *MAPS}
    for output in {*ALTERNATIVES, *MAPS}:
        assert hasattr(view, output) == (output in view.spec.outputs), output
        if output not in view.spec.outputs:
            with pytest.raises(MissingOutputError, match=rf"^view\.{output}: the detector is a {family}, which has no"):
                getattr(view, output)


def test_an_unknown_name_and_an_error_inside_a_stage_are_reported_as_they_are() -> None:
    view = QueryDetector().view(batch())
    with pytest.raises(AttributeError, match="no attribute 'fpn'"):
        _ = view.fpn  # type: ignore[attr-defined]
    view.net.decoder = nn.Identity()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="positional arguments"):
        _ = view.queries  # type: ignore[attr-defined]
    del view.net.queries  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'queries'"):
        _ = view.queries  # type: ignore[attr-defined]


def test_a_detector_without_neck_anchors_and_regions_computes_and_teaches() -> None:
    detector = QueryDetector()
    view = detector.view(batch())
    assert {stride: tuple(x.shape) for stride, x in view.body.items()} == {
        s: (1, 8, 64 // s, 96 // s) for s in (4, 8, 16, 32)
    }
    assert view.queries.shape == (1, 5, 8)  # type: ignore[attr-defined]
    view.queries.sum().backward()  # type: ignore[attr-defined]
    assert detector.net.backbone.body.stages[0].weight.grad is not None
    assert non_finite_levels("student", view) == []
    taught = Teacher(detector).view(batch(), prefetch=("neck", "queries"))
    assert torch.allclose(taught.queries, view.queries, atol=1e-6)  # type: ignore[attr-defined]
    with pytest.raises(
        DistillError, match=r"view\.rois: the detector is a detr, which has no rois\. Choose a two-stage"
    ):
        _ = view.rois


def test_the_doctor_shows_the_body_of_a_detector_without_a_neck() -> None:
    view = QueryDetector().view(batch())
    assert shapes(view, None) == [{"stride": s, "student body": [8, 64 // s, 96 // s]} for s in (4, 8, 16, 32)]
    names, rows = measure_terms(
        view, {"student/a": view.body[4].sum(), "x/b": view.body[32].sum()}, {"student/a": 1.0, "x/b": 1.0}
    )
    assert names == ["x/b"]
    assert rows[0, 2] == GRADIENT_FACTOR  # the derivative of the sum is 1 at each cell


def test_not_finite_maps_are_found_without_a_neck() -> None:
    detector = QueryDetector()
    with torch.no_grad():
        detector.net.backbone.body.stages[2].weight.fill_(float("nan"))
    assert non_finite_levels("student", detector.view(batch())) == [
        f"student's body at stride {s}, images [1]" for s in (16, 32)
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            FGFI,
            r"neck: the {} has no feature pyramid\. Set the weights of neck to 0, "
            r"or choose a detector with a feature pyramid",
        ),
        (SSIM, r"neck: the {} has no feature pyramid"),
        (TADF, r"neck: the {} has no feature pyramid"),
        (Chen, r"hint: the {} has no feature pyramid"),
        (DeFeat, r"neck: the {} has no feature pyramid"),
        (
            Mimic,
            r"regions: the {} is a detr, which has no roi_features\. Set the weights of regions to 0, or choose",
        ),
        (DSIG, r"nodes and edges: the {} is a detr, which has no roi_features"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_losses_that_need_a_neck_refuse_a_detector_without_one(make: Any, message: str, role: str) -> None:
    bare, whole = QueryDetector().spec, pyramid_spec()
    with pytest.raises(DistillError, match=message.format(role)):
        make(bare, whole) if role == "student" else make(whole, bare)


def test_require_names_reader_role_family_and_remedies() -> None:
    one_stage = pyramid_spec(two_stage=False)
    require(one_stage, "class_logits", "logits")
    with pytest.raises(DistillError) as refusal:
        require(one_stage, "rois", "nodes", "student", "Set nodes.foreground=0")
    assert str(refusal.value) == (
        "nodes: the student is a retinanet, which has no rois. Set nodes.foreground=0, or choose a two-stage detector "
        "(model=frcnn_r50)"
    )
