"""DSIG on real, small detectors of each family: what it reads, what it costs, and where its gradient goes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from distill.cli.config import compose
from distill.losses.chen import Chen
from distill.losses.dsig import DSIG
from distill.types import Batch, DistillError
from helpers.detectors import BOX_FAMILIES, FAMILIES, count_calls, padded_batch, random_detector
from helpers.runs import TINY, Cli, summary

OPTION = {"faster_rcnn": "dsig", "mask_rcnn": "dsig", "retinanet": "dsig_retinanet", "fcos": "dsig_retinanet"}


def settings(option: str) -> dict[str, Any]:
    """The constructor's parameters as the option has them."""
    node: Any = OmegaConf.to_container(compose.compose_config([f"distill={option}"]).distill.losses.dsig, resolve=True)
    return {name: value for name, value in node.items() if name != "_target_"}


def pair(family: str, **teacher: Any) -> tuple[Any, Any]:
    return random_detector(family), random_detector(family, seed=1, **teacher)


def total(loss: DSIG, values: dict[str, Tensor]) -> Tensor:
    return torch.stack([loss.weights[name] * value for name, value in values.items()]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_the_student_alone(family: str) -> None:
    student, teacher = pair(family)
    loss, data = DSIG(student.spec, teacher.spec, **settings(OPTION[family])), padded_batch()
    values = loss(student.view(data, seed=3), teacher.view(data, frozen=True, seed=4))
    assert values.keys() == loss.weights.keys()
    assert all(value.isfinite() and value > 0 for value in values.values())
    total(loss, values).backward()
    assert student.net.backbone.body["conv1"].weight.grad.abs().sum() > 0
    for layer in student.class_layers:
        if not layer.startswith("roi_heads.mask"):  # DSIG has no term on masks
            assert student.net.get_submodule(layer).weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_zero_for_an_equal_teacher(family: str) -> None:
    student, twin = random_detector(family), random_detector(family)
    data = padded_batch()
    values = DSIG(student.spec, twin.spec, **settings(OPTION[family]))(
        student.view(data, seed=3), twin.view(data, frozen=True, seed=4)
    )
    for name, value in values.items():
        assert value.item() == pytest.approx(0, abs=1e-9), name


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_each_model_pools_once_in_a_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(family)
    counts = [count_calls(detector, monkeypatch) for detector in (student, teacher)]
    loss, data = DSIG(student.spec, teacher.spec, **settings(OPTION[family])), padded_batch()
    view = student.view(data, seed=3)
    assert view.losses
    loss(view, teacher.view(data, frozen=True, seed=4))
    assert [calls["pool"] for calls in counts] == [1, 1]
    if family == "faster_rcnn":
        assert [calls["box"] for calls in counts] == [1, 1]
        assert counts[1]["rpn"] == 0  # the regions are the student's


def by_index(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Mean node error and half the mean edge error of one image's nodes, all of which count."""
    s, t = (F.normalize(x.flatten(1)) for x in (student, teacher))
    return F.mse_loss(student, teacher), F.mse_loss(s @ s.T, t @ t.T) / 2


def test_the_two_stage_graph_is_that_of_the_student_s_sample() -> None:
    student, teacher = pair("faster_rcnn")
    data, loss = padded_batch(), DSIG(student.spec, teacher.spec)
    student_view, teacher_view = student.view(data, seed=3), teacher.view(data, frozen=True, seed=4)
    values = {name: value.item() for name, value in loss(student_view, teacher_view).items()}
    regions, expected = student_view.rois, dict.fromkeys(("nodes.foreground", "nodes.background", "edges.all"), 0.0)
    counts = [len(boxes) for boxes in regions.boxes]
    surprise = F.cross_entropy(
        teacher_view.roi_logits(regions.boxes)[0], torch.zeros(sum(counts), dtype=torch.int64), reduction="none"
    )
    pooled = [view.roi_features(regions.boxes).split(counts) for view in (student_view, teacher_view)]
    kept = 0
    for s, t, labels, hard in zip(*pooled, regions.labels, surprise.split(counts), strict=True):
        positive, negative = labels > 0, labels == 0
        nodes = positive | (negative & (hard >= 0.6))
        kept += int((nodes & negative).sum())
        if positive.any():
            expected["nodes.foreground"] += 2 / 3 * by_index(s[positive], t[positive])[0].item()
        ratio = positive.sum().item() / negative.sum().item()
        expected["nodes.background"] += 2 / 3 * 7.5 * ratio * by_index(s[negative], t[negative])[0].item()
        if nodes.any():
            expected["edges.all"] += 2 / 3 * by_index(s[nodes], t[nodes])[1].item()
    assert 0 < kept < sum(counts)
    assert not regions.labels[1].any()  # an image without boxes
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_one_stage_graph_is_that_of_the_student_s_predictions() -> None:
    student, teacher = pair("retinanet")
    data, loss = padded_batch(), DSIG(student.spec, teacher.spec, **settings("dsig_retinanet"))
    student_view, teacher_view = student.view(data, seed=3), teacher.view(data, frozen=True, seed=4)
    values = loss(student_view, teacher_view)
    boxes = [detections.boxes for detections in student_view.predictions(score=0.0, nms=0.5, top=100)]
    counts = [len(image_boxes) for image_boxes in boxes]
    assert 20 < max(counts) <= 100
    pooled = [view.roi_features(boxes).split(counts) for view in (student_view, teacher_view)]
    images = [by_index(s, t) for s, t in zip(*pooled, strict=True)]
    assert values["nodes.predicted"].item() == pytest.approx(2 / 3 * sum(n.item() for n, _ in images), rel=1e-4)
    assert values["edges.all"].item() == pytest.approx(2 / 3 * sum(e.item() for _, e in images), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wider_teacher_is_met_by_adapters_under_autocast(family: str) -> None:
    student, teacher = pair(family, neck_channels=96)
    loss = DSIG(student.spec, teacher.spec, **{**settings(OPTION[family]), "adapter": {"kernel": 1}})
    data = padded_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = loss(student.view(data, seed=3), teacher.view(data, frozen=True, seed=4))
    assert all(value.isfinite() and value.dtype == torch.float32 for value in values.values())
    total(loss, values).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


@pytest.mark.parametrize(
    ("family", "option"), [("retinanet", "dsig_r50_r101"), ("faster_rcnn", "dsig_retinanet_small")]
)
def test_an_option_of_the_other_family_says_which_to_choose(family: str, option: str) -> None:
    spec = random_detector(family).spec
    with pytest.raises(DistillError, match=f"the student is a {family}.*Choose distill={OPTION[family]}"):
        DSIG(spec, spec, **settings(option))


@pytest.mark.parametrize(
    ("option", "weights"),
    [
        (
            "dsig",
            {
                "nodes.foreground": 0.5,
                "nodes.background": 0.5,
                "edges.all": 2,
                "neck.all": 0.5,
                "logits.classes": 3,
                "logits.boxes": 1,
            },
        ),
        ("dsig_r50_r101", {"nodes.foreground": 0.5, "nodes.background": 0.5, "edges.all": 1}),
        ("dsig_r101_r152", {"nodes.foreground": 0.5, "edges.all": 1}),
        (
            "dsig_retinanet",
            {"nodes.predicted": 0.5, "edges.all": 1, "neck.all": 0.5, "logits.classes": 1, "logits.boxes": 1},
        ),
        ("dsig_retinanet_small", {"nodes.predicted": 0.5, "edges.all": 1, "neck.all": 0.5}),
    ],
)  # fmt: skip
def test_options_have_the_released_weights(option: str, weights: dict[str, float]) -> None:
    spec = random_detector("retinanet" if "retinanet" in option else "faster_rcnn").spec
    loss = DSIG(spec, spec, **settings(option))
    assert loss.weights == weights
    assert (loss.alpha, loss.mining) == (7.5, None if "retinanet" in option else 0.6)


@pytest.mark.exhaustive
def test_dsig_adds_to_defeat(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    lines = ["distill=[defeat,dsig]", f"teacher.weights={tiny_teacher}", *TINY, "hydra.run.dir=run"]
    assert cli(["train", *lines]) == 0
    terms = summary(tmp_path / "run")["terms"]
    assert {"term/defeat/neck.foreground", "term/dsig/nodes.background", "term/dsig/edges.all"} <= set(terms)
    assert terms["loss/dsig/edges.all"] == pytest.approx(2 * terms["term/dsig/edges.all"])


def test_boxes_of_other_anchors_are_not_compared() -> None:
    sizes = [[2 * side for side in level] for level in random_detector("retinanet").options["anchors"]["sizes"]]
    student, teacher = pair("retinanet", anchor_sizes=sizes)
    with pytest.raises(DistillError, match=r"logits: expected equal anchors, but anchors\.sizes is \[\[32, 40"):
        DSIG(student.spec, teacher.spec, **settings("dsig_retinanet"))


@pytest.mark.parametrize("loss", [partial(DSIG, **settings("dsig_retinanet")), Chen])
def test_anchors_that_are_equal_at_some_image_sizes_alone_are_not_compared(loss: Any) -> None:
    """`fitted` and `nominal` steps agree at 128 x 128 and differ at 96 x 160, at stride 64."""
    family = "faster_rcnn" if loss is Chen else "retinanet"
    fitted, nominal = (random_detector(family, anchor_step=step) for step in ("fitted", "nominal"))
    square, oblong = (
        Batch(torch.zeros(1, 3, *size, dtype=torch.uint8), (size,), (size,), (), (0,))
        for size in ((128, 128), (96, 160))
    )
    grids = [[model.view(batch).anchors[64] for model in (fitted, nominal)] for batch in (square, oblong)]
    assert [torch.equal(*pair_of_grids) for pair_of_grids in grids] == [True, False]
    with pytest.raises(DistillError, match=r"expected equal anchors, but anchors\.step is fitted .* and nominal"):
        loss(fitted.spec, nominal.spec)
    loss(fitted.spec, fitted.spec)
