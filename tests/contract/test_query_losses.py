"""The losses of queries on real detectors of transformers: numbers, gradients, and a teacher that stays as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from distill.cli.config import override_checks
from distill.cli.runs.assembly import build_losses
from distill.cli.runs.preflight import plan_losses, plan_teacher
from distill.cli.runs.teacher_cache import planned_teacher
from distill.losses.adl import ADL
from distill.losses.base import DistillLoss
from distill.losses.cwd import CWD
from distill.losses.detr_corners import DETRCorners
from distill.losses.detr_features import DETRFeatures
from distill.losses.detr_logits import DETRLogits
from distill.losses.detr_points import DETRPoints
from distill.losses.dist import DIST
from distill.losses.fgd import FGD
from distill.losses.frs import FRS
from distill.losses.pkd import PKD
from distill.types import DistillError
from helpers.detectors import (
    QUERY_FAMILIES,
    padded_batch,
    query_detector,
    random_detector,
    random_query_detector,
    square_batch,
)

pytest.importorskip("transformers", reason="the detectors with queries are transformers'")
pytest.importorskip("scipy", reason="the matching of queries needs scipy")


@functools.cache
def detector(family: str, seed: int, layers: int = 3) -> Any:
    """A small detector with random weights."""
    if family not in QUERY_FAMILIES:
        return random_detector(family, seed)
    return random_query_detector(family, seed, decoder_layers=layers)


def views(student: Any, teacher: Any) -> tuple[Any, Any]:
    batch = padded_batch(((128, 128), (128, 128)))
    return student.train().view(batch, seed=0), teacher.eval().view(batch, frozen=True, seed=0)


ALL = {"classes": 1.0, "l1": 5.0, "giou": 2.0}
CASES: dict[str, tuple[Callable[..., DistillLoss], str, str]] = {
    "logits": (DETRLogits, "rtdetr", "rtdetr"),
    "logits between families": (DETRLogits, "rtdetr", "dfine"),
    "logits of groups": (DETRLogits, "rfdetr", "rtdetr"),
    "logits of a teacher with groups": (DETRLogits, "rtdetr", "rfdetr"),
    "points": (partial(DETRPoints, assignment=ALL), "rtdetr", "rtdetr"),
    "points between families": (partial(DETRPoints, assignment=ALL), "dfine", "rtdetr"),
    "corners of points": (DETRCorners, "dfine", "dfine"),
    "corners of matches": (partial(DETRCorners, corners={"pairs": "matching"}), "dfine", "dfine"),
    "corners of another family": (partial(DETRCorners, corners={"pairs": "matching"}), "deimv2", "dfine"),
    "features": (DETRFeatures, "rtdetr", "dfine"),
    "features of another family": (DETRFeatures, "faster_rcnn", "rtdetr"),
    "features on one stride": (DETRFeatures, "rfdetr", "rtdetr"),
    "features of one stride": (DETRFeatures, "rtdetr", "rfdetr"),
    "maps on one stride": (PKD, "rfdetr", "dfine"),
    "maps of one stride": (FGD, "deimv2", "rfdetr"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loss_gives_numbers_and_gradients(case: str) -> None:
    """The teacher's decoder is deeper than the student's."""
    build, families = CASES[case][0], CASES[case][1:]
    student, teacher = detector(families[0], 0), detector(families[1], 1, 4)
    before = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    loss = build(student.spec, teacher.spec)
    values = loss(*views(student, teacher))
    assert values.keys() == loss.weights.keys()
    parameters = {name: parameter for name, parameter in student.net.named_parameters() if parameter.requires_grad}
    for name, value in values.items():
        assert value.isfinite(), name
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients), name
        moved = {
            n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None and gradient.any()
        }
        assert any(parameter.startswith(student.body_path) for parameter in moved), name
    assert all(parameter.grad is None for parameter in teacher.net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())


def test_the_student_s_own_points_give_its_own_queries() -> None:
    """So that a pair of equal detectors has the points' terms at their minimum."""
    twin = detector("rtdetr", 0)
    student, teacher = views(twin, twin)
    twin.eval()  # the same statistics in both
    values = DETRPoints(twin.spec, twin.spec)(student, teacher)
    assert values["points.l1"].item() == pytest.approx(0, abs=1e-5)
    assert values["points.giou"].item() == pytest.approx(0, abs=1e-4)


def with_other_classes(teacher: Any, order: list[int], names: list[str], bridge: dict[str, str] | None = None) -> Any:
    """A copy whose class i + 1, with one of `names`, is the class ``order[i] + 1`` of `teacher`."""
    other = copy.deepcopy(teacher)
    layers = map(other.net.get_submodule, other.class_layers)
    tied = {id(parameter): parameter for layer in layers for parameter in layer.parameters()}
    with torch.no_grad():
        for parameter in tied.values():
            parameter[: len(order)] = parameter[order].clone()
    other.spec = replace(other.spec, classes=tuple(names), bridge=bridge)
    return other


@pytest.mark.parametrize("case", ["points", "corners of points", "corners of matches", "logits"])
def test_the_order_of_the_teacher_s_classes_changes_nothing(case: str) -> None:
    """Labels of objects are those of the student. The matching of the teacher's queries read its columns by them."""
    build, family, _ = CASES[case]
    student, teacher = detector(family, 0), detector(family, 1)
    expected = build(student.spec, teacher.spec)(*views(student, teacher))
    assert [len(rows) for rows, _ in views(student, teacher)[1].query_targets[-1]] == [3, 0]
    names = {"permuted": ["owl", "cat", "dog"], "mapped": ["bird", "kitten", "puppy"]}
    for bridge in (None, {"bird": "owl", "kitten": "cat", "puppy": "dog"}):
        other = with_other_classes(teacher, [2, 0, 1], names["mapped" if bridge else "permuted"], bridge)
        values = build(student.spec, other.spec)(*views(student, other))
        for term, value in values.items():
            assert value.item() == pytest.approx(expected[term].item(), rel=1e-5), (term, bridge)


def test_a_teacher_whose_queries_are_unlike_its_neck_is_refused_before_it_is_trained() -> None:
    """RT-DETR R101 and D-FINE X have such sizes."""
    words = ["model=frcnn_r10_mini", "teacher=rtdetr_mini", "teacher.model.neck_channels=96", "distill=detr_features"]
    cfg = override_checks.compose_without_run(words)
    options = plan_teacher(cfg)
    assert options is not None
    teacher, student = planned_teacher(options, ["cat", "dog", "owl"]).spec, detector("faster_rcnn", 0)
    with pytest.raises(DistillError, match=r"decoder_channels=64 and teacher\.model\.neck_channels=96"):
        build_losses(plan_losses(cfg), student.spec, teacher)
    wide = query_detector("rtdetr", neck_channels=96, decoder_channels=32)
    layer = views(student, wide)[1].queries[-1]
    assert layer.hidden.shape[2] == wide.spec.query_channels == 32


def test_corners_of_the_published_sizes_of_d_fine_are_refused_before_a_teacher_is_trained() -> None:
    """X has another curve of its bins than N, S, M and L. N has two levels."""
    names, specs = ["cat", "dog", "owl"], {}
    for size in ("n", "s", "l", "x"):
        words = ["model=dfine_mini", f"teacher=dfine_{size}", "distill=detr_corners"]
        options = plan_teacher(override_checks.compose_without_run(words))
        assert options is not None
        specs[size] = planned_teacher(options, names).spec
    for size in ("n", "s", "l"):
        for pairs in ("points", "matching"):
            with pytest.raises(DistillError, match=r"Train .*\(teacher\.model\.bin_curve=4\.0;"):
                DETRCorners(specs[size], specs["x"], {"pairs": pairs})
    with pytest.raises(DistillError, match=r"Set corners\.pairs=matching"):
        DETRCorners(specs["n"], specs["l"])
    DETRCorners(specs["n"], specs["l"], {"pairs": "matching"})
    DETRCorners(specs["s"], specs["l"])


def test_corners_of_a_lite_deimv2_are_no_targets_but_can_learn() -> None:
    """The losses of Pico, Femto and Atto train the mean of a distribution alone, not its form."""
    names, specs = ["cat", "dog", "owl"], {}
    for size in ("n", "atto", "pico"):
        words = ["model=dfine_n", f"teacher=deimv2_{size}", "distill=detr_corners"]
        options = plan_teacher(override_checks.compose_without_run(words))
        assert options is not None
        specs[size] = planned_teacher(options, names).spec
    for size in ("atto", "pico"):
        with pytest.raises(DistillError, match=r"teacher is a deimv2 with corner_losses=false.*teacher=deimv2_n"):
            DETRCorners(specs["n"], specs[size])
        DETRCorners(specs[size], specs["n"])
        assert not DETRCorners(specs["n"], specs[size], {"divergence": 0}).weights


@pytest.mark.parametrize("corner_losses", [False, True])
def test_without_corner_losses_the_form_of_a_distribution_is_not_trained(corner_losses: bool) -> None:
    """Distributions of another form that lead to the same boxes have the same losses."""
    torch.manual_seed(0)
    student = query_detector("deimv2", corner_losses=corner_losses, denoising=0)
    assert student.spec.trains_corners == corner_losses
    losses = []
    for scale in (0.0, 1.0):
        view = student.view(square_batch(), frozen=True, seed=0)
        for layer in view.queries:
            layer.corners.add_(scale * torch.randn_like(layer.corners))
        losses.append(float(sum(view.losses.values())))
    assert (losses[0] != losses[1]) == corner_losses


def test_corners_of_matches_compare_other_strides() -> None:
    """D-FINE L teaches D-FINE N: only the matched queries are compared."""
    student = query_detector("dfine", strides=(16, 32))
    teacher = detector("dfine", 1)
    value = DETRCorners(student.spec, teacher.spec, {"pairs": "matching"})(*views(student, teacher))
    assert value["corners.divergence"].isfinite()
    assert value["corners.divergence"].requires_grad


def test_other_bins_and_strides_are_refused() -> None:
    plain = detector("dfine", 0).spec
    curved, coarse = query_detector("dfine", bin_curve=8.0).spec, query_detector("rtdetr", strides=(16, 32)).spec
    with pytest.raises(DistillError, match=r"model\.bin_curve=4\.0 beside teacher\.model\.bin_curve=8\.0"):
        DETRCorners(plain, curved)
    with pytest.raises(DistillError, match=r"model\.strides=\[16, 32\] and teacher\.model\.strides=\[8, 16, 32\]"):
        DETRPoints(coarse, detector("rtdetr", 0).spec)
    message = r"expected outputs at the same strides, got \[.*\] of the student \(a .*\) and \[.*\] of the teacher"
    for build in (ADL, partial(CWD, logits={"classes": 1.0}), DIST, FRS):  # that compare scores cell by cell
        for specs in ((coarse, plain), (plain, coarse), (detector("rfdetr", 0).spec, coarse)):
            with pytest.raises(DistillError, match=message):
                build(*specs)
    FRS(coarse, plain, logits={"classes": 0.0})  # the neck is compared on the strides that both have
    for families in (("rfdetr", "rtdetr"), ("rtdetr", "rfdetr")):  # whose decoder starts from no foreign points
        for assignment in ({}, ALL):
            with pytest.raises(DistillError, match=r"the (student|teacher) is a rfdetr, which has no"):
                DETRPoints(*(detector(family, 0).spec for family in families), assignment=assignment)
