"""Files of Detectron2 and MMDetection: names, rows, options and refusals."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.convert.caffe2_names import renamed, to_detectron2
from distill.convert.foreign import ForeignDetector, background_added, background_first, rename
from distill.convert.formats import read_foreign
from distill.convert.python_config import parse_config
from distill.detectors.base import Detector
from distill.detectors.registry import restore_detector
from distill.files import load_tensors
from distill.types import DistillError
from helpers.foreign_files import detectron2_state, mmdetection_state

FAMILIES = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos")
STATES = {"Detectron2": detectron2_state, "MMDetection": mmdetection_state}
MM_RETINANET = """
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=False),
    backbone=dict(type='ResNet', depth=18, style='caffe', frozen_stages=0),
    neck=dict(type='FPN', num_outs=5, start_level=1, add_extra_convs='on_lateral', relu_before_extra_convs=True),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, stacked_convs=4,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, center_offset=0.5,
            ratios=[0.25, 0.5, 1.0, 1.0, 2.0, 4.0, 3.0, 5.0, 6.0], strides=[8, 16, 32, 64, 128], scale_major=False),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.5, 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2])),
    test_cfg=dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.4), max_per_img=50))
"""


def read(project: str, state: dict[str, Tensor], where: str = "model.pth", **options: Any) -> ForeignDetector:
    key = "model" if project == "Detectron2" else "state_dict"
    found = read_foreign({key: state}, where, **options)
    assert found is not None
    return found


def build(project: str, state: dict[str, Tensor]) -> Detector:
    found = read(project, state)
    return restore_detector(found.description, found.state, "model.pth")


def test_the_projects_states_have_their_number_of_entries() -> None:
    """The states of these tests against the numbers of entries that the projects' programs print."""
    counts = {"faster_rcnn": (295, 348), "mask_rcnn": (307, 360), "retinanet": (301, 354), "fcos": (319, 369)}
    for family, (detectron2, mmdetection) in counts.items():
        options: Any = {"depth": 50, "channels": 8, "head": 8, "zeros": True}
        assert len(detectron2_state(family, **options)) == detectron2
        assert len(mmdetection_state(family, **options)) == mmdetection
    assert len(mmdetection_state("fcos", depth=50, channels=8, conv_bias=True, zeros=True)) == 377


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("project", STATES)
def test_every_tensor_finds_its_place(project: str, family: str) -> None:
    state = STATES[project](family)
    found = read(project, state)
    detector = restore_detector(found.description, found.state, "model.pth")  # refuses missing and unexpected tensors
    assert detector.family == family
    assert found.unused == []
    own = detector.net.state_dict()
    place = {"Detectron2": "backbone.bottom_up.res3.1.conv2.weight", "MMDetection": "backbone.layer2.1.conv2.weight"}
    assert torch.equal(own["backbone.body.layer2.1.conv2.weight"], state[place[project]])


def test_the_background_moves_to_the_front_and_gets_no_box() -> None:
    state = detectron2_state("mask_rcnn", classes=2)
    found = read("Detectron2", state).state
    rows, box = state["roi_heads.box_predictor.cls_score.bias"], state["roi_heads.box_predictor.bbox_pred.bias"]
    assert found["roi_heads.box_predictor.cls_score.bias"].tolist() == [rows[2], rows[0], rows[1]]
    assert found["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0.0] * 4 + box.tolist()
    masks = found["roi_heads.mask_predictor.mask_fcn_logits.bias"]
    assert masks.tolist() == [0.0, *state["roi_heads.mask_head.predictor.bias"].tolist()]
    assert background_first(torch.tensor([1, 2, 9])).tolist() == [9, 1, 2]


def test_class_agnostic_boxes_are_repeated_for_each_class() -> None:
    state = detectron2_state("faster_rcnn", classes=3)
    for kind in ("weight", "bias"):
        name = f"roi_heads.box_predictor.bbox_pred.{kind}"
        state[name] = state[name][:4]
    found = read("Detectron2", state)
    bias = state["roi_heads.box_predictor.bbox_pred.bias"].tolist()
    assert found.state["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0.0] * 4 + bias * 3
    assert any("class-agnostic" in line for line in found.warnings)
    assert background_added(torch.ones(4), 4, 1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_label_0_of_a_dense_head_is_never_found() -> None:
    state = detectron2_state("retinanet", classes=2)
    bias = read("Detectron2", state).state["head.classification_head.cls_logits.bias"].view(9, 3)
    assert torch.sigmoid(bias[:, 0]).max() == 0
    assert bias[:, 1:].flatten().tolist() == state["head.cls_score.bias"].tolist()


def test_rename_calculates_with_numbers() -> None:
    table = [("a.{i}.*", "b.{i/2*3}.*"), ("c.res{k}.x", "layer{k-1}")]
    assert rename({"a.4.bias": torch.ones(1), "c.res5.x": torch.ones(1), "d": torch.ones(1)}, table) == (
        {"a.4.bias": "b.6.bias", "c.res5.x": "layer4"},
        ["d"],
    )


@pytest.mark.parametrize(("groups", "std"), [((1, 64), 1.0), ((32, 8), 57.375)])
def test_detectron2_has_the_zoos_input(groups: tuple[int, int], std: float) -> None:
    found = read(
        "Detectron2", detectron2_state("faster_rcnn", depth=50, channels=32, head=8, groups=groups, zeros=True)
    )
    options = found.options
    restore_detector(found.description, found.state, "model.pth")
    assert options["pixels.channel_order"] == "bgr"
    assert options["pixels.std"][0] == pytest.approx(std / 255)
    assert options["backbone.stride_in_1x1"] is (groups == (1, 64))
    assert (options.get("backbone.groups", 1), options.get("backbone.group_width", 64)) == groups


def test_detectron2s_configuration_decides() -> None:
    config = """
MODEL:
  PIXEL_MEAN: [10.0, 20.0, 30.0]
  PIXEL_STD: [1.0, 2.0, 4.0]
  RESNETS: {STRIDE_IN_1X1: false, NORM: FrozenBN}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [128], [256]], ASPECT_RATIOS: [[0.4, 1.0, 3.0]], OFFSET: 0.5}
  RPN: {BBOX_REG_WEIGHTS: !!python/tuple [2.0, 2.0, 1.0, 1.0], NMS_THRESH: 0.6, POST_NMS_TOPK_TEST: 300}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.01, NMS_THRESH_TEST: 0.3}
  ROI_BOX_HEAD: {POOLER_TYPE: ROIAlign, POOLER_SAMPLING_RATIO: 2, BBOX_REG_WEIGHTS: [5.0, 5.0, 2.0, 2.0]}
TEST: {DETECTIONS_PER_IMAGE: 20}
INPUT: {FORMAT: RGB, MIN_SIZE_TEST: 600, MAX_SIZE_TEST: 1000}
"""
    found = read("Detectron2", detectron2_state("faster_rcnn"), config=config)
    expected = {
        "pixels.channel_order": "rgb",
        "pixels.mean": [10 / 255, 20 / 255, 30 / 255],
        "pixels.std": [1 / 255, 2 / 255, 4 / 255],
        "backbone.stride_in_1x1": False,
        "anchors.sizes": [[16.0], [32.0], [64.0], [128.0], [256.0]],
        "anchors.ratios": [0.4, 1.0, 3.0],
        "anchors.offset": 0.5,
        "anchor_delta_weights": [2.0, 2.0, 1.0, 1.0],
        "box_delta_weights": [5.0, 5.0, 2.0, 2.0],
        "rpn_nms_thresh": 0.6,
        "rpn_post_nms_top_n_test": 300,
        "score_thresh": 0.01,
        "nms_thresh": 0.3,
        "detections_per_img": 20,
        "box_roi_aligned": False,
        "box_sampling_ratio": 2,
        "min_size": 600,
        "max_size": 1000,
    }
    assert {path: found.options[path] for path in expected} == expected
    detector: Any = restore_detector(found.description, found.state, "model.pth")
    assert detector.net.roi_heads.box_coder.weights == (5.0, 5.0, 2.0, 2.0)
    assert detector.net.rpn.box_coder.weights == (2.0, 2.0, 1.0, 1.0)


def test_mmdetections_configuration_decides() -> None:
    state = mmdetection_state("retinanet", channels=64)
    source = state["neck.fpn_convs.3.conv.weight"]
    state["neck.fpn_convs.3.conv.weight"] = source[:, :64]  # on_lateral: reads the pyramid's channels
    found = read_foreign({"meta": {"cfg": MM_RETINANET, "mmdet_version": "2.28.2"}, "state_dict": state}, "m.pth")
    assert found is not None
    expected = {
        "pixels.channel_order": "bgr",
        "pixels.mean": [1 / 255, 2 / 255, 3 / 255],
        "pixels.std": [4 / 255, 5 / 255, 6 / 255],
        "backbone.stride_in_1x1": True,
        "backbone.trainable_stages": 4,
        "p6_from": "lateral",
        "p7_relu": True,
        "anchors.sizes": [[32.0], [64.0], [128.0], [256.0], [512.0]],
        "anchors.offset": 0.5,
        "anchors.order": "size",
        "anchor_delta_weights": [10.0, 10.0, 5.0, 5.0],
        "detection_rule": "mmdetection2",
        "topk_candidates": 500,
        "score_thresh": 0.1,
        "nms_thresh": 0.4,
        "detections_per_img": 50,
    }
    assert {path: found.options[path] for path in expected} == expected
    detector: Any = restore_detector(found.description, found.state, "m.pth")
    bias = state["bbox_head.retina_reg.bias"].view(9, 4)
    shift = torch.tensor([5.0, 0, 0, 0])  # the mean 0.5 in units of std 0.1
    assert torch.allclose(detector.net.head.regression_head.bbox_reg.bias.view(9, 4), bias + shift)


@pytest.mark.parametrize(
    ("family", "options", "name", "expected"),
    [
        ("faster_rcnn", {}, "faster_rcnn_r50_fpn_1x.pth", ("rgb", 123.675, 58.395, False)),
        ("faster_rcnn", {}, "faster_rcnn_r50_caffe_fpn_1x.pth", ("bgr", 103.53, 1.0, True)),
        ("faster_rcnn", {"groups": (32, 8)}, "x.pth", ("bgr", 103.53, 57.375, False)),
        ("faster_rcnn", {"groups": (64, 4)}, "x.pth", ("rgb", 123.675, 58.395, False)),
        ("fcos", {"conv_bias": False}, "x.pth", ("bgr", 102.9801, 1.0, True)),
        ("fcos", {"conv_bias": True}, "x.pth", ("bgr", 103.53, 1.0, True)),
    ],
)
def test_mmdetection_without_configuration_has_a_recipe_of_the_zoo(
    family: str, options: dict[str, Any], name: str, expected: tuple[str, float, float, bool]
) -> None:
    state = mmdetection_state(family, depth=50, channels=64, head=8, zeros=True, **options)
    found = read("MMDetection", state, name)
    order, mean, std, stride = expected
    assert found.options["pixels.channel_order"] == order
    assert found.options["pixels.mean"][0] == pytest.approx(mean / 255)
    assert found.options["pixels.std"][0] == pytest.approx(std / 255)
    assert found.options["backbone.stride_in_1x1"] is stride
    assert any("The tensors do not show the input format" in line for line in found.warnings)


@pytest.mark.parametrize("improved", [False, True])
def test_mmdetections_fcos_is_of_two_kinds(improved: bool) -> None:
    found = read("MMDetection", mmdetection_state("fcos", conv_bias=improved)).options
    assert found["centerness_from"] == ("box" if improved else "class")
    assert found["distances"] == ("relu" if improved else "exp")
    assert found["nms_thresh"] == (0.6 if improved else 0.5)
    assert (found["point_offset"], found["level_scales"], found["p6_from"]) == (0.5, True, "p5")


def test_class_names_come_from_the_file_from_coco_or_are_numbers() -> None:
    state = mmdetection_state("retinanet")
    for meta in ({"CLASSES": ("a", "b", "c")}, {"dataset_meta": {"CLASSES": ["a", "b", "c"]}}):
        found = read_foreign({"meta": meta, "state_dict": state}, "m.pth")
        assert found is not None
        assert found.options["classes"] == ["a", "b", "c"]
    assert read("MMDetection", state).options["classes"] == ["class_1", "class_2", "class_3"]
    coco = read("Detectron2", detectron2_state("retinanet", classes=80)).options["classes"]
    assert (len(coco), coco[0], coco[11], coco[79]) == (80, "person", "stop sign", "toothbrush")
    with pytest.raises(DistillError, match=r"for 3 classes, but 2 names"):
        read("MMDetection", state, classes=["a", "b"])


def with_part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**state, name: torch.ones(2)}


@pytest.mark.parametrize(
    ("project", "name", "part"),
    [
        ("Detectron2", "roi_heads.box_predictor.0.cls_score.weight", "cascade"),
        ("Detectron2", "roi_heads.keypoint_head.conv_fcn1.weight", "keypoint"),
        ("Detectron2", "backbone.fpn_lateral2.norm.weight", "neck: norms"),
        ("Detectron2", "backbone.bottom_up.res4.0.conv2_offset.weight", "deformable"),
        ("Detectron2", "backbone.bottom_up.res4.0.gate.weight", "1 unknown tensors: .*gate"),
        ("MMDetection", "backbone.layer2.0.conv2.conv_offset.weight", "deformable"),
        ("MMDetection", "roi_head.bbox_head.0.fc_cls.weight", "cascade"),
        ("MMDetection", "backbone.stem.0.weight", "V1c"),
        ("MMDetection", "bbox_head.fc_cls.weight", "MMDetection 1.x"),
    ],
)
def test_a_part_that_no_family_has_is_named(project: str, name: str, part: str) -> None:
    with pytest.raises(DistillError, match=part):
        read(project, with_part(STATES[project]("faster_rcnn"), name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("type='RetinaNet', backbone=dict(type='Swin')", "backbone.type is 'Swin'"),
        ("type='RetinaNet', neck=dict(type='PAFPN')", "neck.type is 'PAFPN'"),
        ("test_cfg=dict(nms=dict(type='soft_nms'))", "soft_nms"),
        ("bbox_head=dict(bbox_coder=dict(type='TBLRBBoxCoder'))", "TBLRBBoxCoder"),
        ("backbone=dict(dilations=(1, 1, 1, 2))", r"dilations is \[1, 1, 1, 2\]"),
        ("neck=dict(act_cfg=dict(type='ReLU'))", "neck.act_cfg"),
        ("neck=dict(add_extra_convs='on_input'), bbox_head=dict(loss_cls=dict(use_sigmoid=False))", "softmax"),
        ("neck=dict(add_extra_convs='on_input'), test_cfg=dict(nms=dict(class_agnostic=True))", "class_agnostic"),
        ("neck=dict(add_extra_convs='on_input'), test_cfg=dict(min_bbox_size=4)", "min_bbox_size is 4"),
    ],
)
def test_a_configuration_that_no_family_can_express_is_refused(change: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        read("MMDetection", mmdetection_state("retinanet"), config=f"model = dict({change})")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mask_roi_extractor=dict(roi_layer=dict(output_size=28))", "mask_roi_extractor.roi_layer.output_size is 28"),
        ("bbox_roi_extractor=dict(featmap_strides=[8, 16, 32])", "featmap_strides"),
        ("bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear'))", "NormedLinear"),
        ("bbox_head=dict(loss_cls=dict(type='SeesawLoss'))", "Seesaw"),
    ],
)
def test_heads_of_regions_that_no_family_can_express_are_refused(change: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        read("MMDetection", mmdetection_state("mask_rcnn"), config=f"model = dict(roi_head=dict({change}))")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ROI_MASK_HEAD: {POOLER_RESOLUTION: 28}", "POOLER_RESOLUTION is 28"),
        ("ROI_BOX_HEAD: {USE_SIGMOID_CE: true}", "USE_SIGMOID_CE"),
        ("ROI_HEADS: {IN_FEATURES: [p2, p3, p4]}", "IN_FEATURES"),
        ("RESNETS: {RES5_DILATION: 2}", "RES5_DILATION"),
    ],
)
def test_a_configuration_of_detectron2_that_no_family_can_express_is_refused(change: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        read("Detectron2", detectron2_state("mask_rcnn"), config=f"MODEL: {{{change}}}")


def test_a_configuration_that_needs_other_files_is_refused_or_warned_of() -> None:
    """The model zoo's own files of MMDetection: style and statistics would silently be those of another recipe."""
    config = "_base_ = './faster_rcnn_r50_caffe_fpn_1x_coco.py'\nmodel = dict(backbone=dict(depth=101))"
    with pytest.raises(DistillError, match=r"_base_ = .*print_config"):
        read("MMDetection", mmdetection_state("faster_rcnn"), config=config)
    found = read("Detectron2", detectron2_state("faster_rcnn"), config="_BASE_: Base.yaml\nMODEL: {MASK_ON: false}")
    assert any("_BASE_: Base.yaml" in line for line in found.warnings)


def test_a_configuration_of_another_project_does_not_replace_the_files_own() -> None:
    """Detectron2's config.yaml may lie in the folder of the file."""
    content = {"meta": {"cfg": MM_RETINANET}, "state_dict": mmdetection_state("retinanet", zeros=True)}
    found = read_foreign(content, "model.pth", config="MODEL:\n  MASK_ON: false\n")
    assert found is not None
    assert found.options["pixels.mean"] == [1 / 255, 2 / 255, 3 / 255]
    assert any("one of Detectron2" in line for line in found.warnings)
    with pytest.raises(DistillError, match="not a configuration of MMDetection"):
        read_foreign(content, "model.pth", config="mean: 3")


@pytest.mark.parametrize(
    ("project", "config"),
    [
        ("MMDetection", "model = dict(data_preprocessor=dict(mean=['x']))"),
        ("MMDetection", "model = dict(backbone=dict(frozen_stages=None))"),
        ("MMDetection", "model = dict(rpn_head=dict(bbox_coder=dict(target_stds=[0, 1, 1, 1])))"),
        ("Detectron2", "MODEL: {PIXEL_STD: 3}"),
        ("Detectron2", "MODEL: {ANCHOR_GENERATOR: {SIZES: []}}"),
        ("Detectron2", "MODEL: {}\nINPUT: {MIN_SIZE_TEST: 0}"),
    ],
)
def test_a_value_of_another_type_is_refused(project: str, config: str) -> None:
    with pytest.raises(DistillError, match=r"^model\.pth: .*configuration.*cannot be read"):
        read(project, STATES[project]("faster_rcnn", zeros=True), config=config)


def test_the_stride_of_a_configuration_without_statistics_decides_the_recipe() -> None:
    config = "model = dict(backbone=dict(style='{}'))"
    for style, family, first in (("caffe", "faster_rcnn", 103.53), ("pytorch", "fcos", 123.675)):
        neck = "" if family == "faster_rcnn" else ", neck=dict(add_extra_convs='on_output')"
        text = config.format(style).replace("))", f"){neck})")
        found = read("MMDetection", mmdetection_state(family, depth=50, channels=32, zeros=True), config=text)
        assert found.options["pixels.mean"][0] == pytest.approx(first / 255)
    state = mmdetection_state("fcos", zeros=True)
    state["bbox_head.scales.2.scale"] = torch.ones(2)
    with pytest.raises(DistillError, match="4 scales"):
        read("MMDetection", state)


def test_the_resize_and_the_limits_of_mmdetections_tests_are_read() -> None:
    config = """
model = dict(type='mmdet.FasterRCNN', backbone=dict(type='mmdet.ResNet', norm_cfg=dict(type='BN', eps=1e-3)))
test_cfg = dict(rpn=dict(nms_pre=-1, max_num=50), rcnn=dict(score_thr=0.2, max_per_img=-1))
data_preprocessor = dict(type='DetDataPreprocessor', mean=[1., 2., 3.], std=[4., 5., 6.], pad_size_divisor=64)
test_pipeline = [dict(type='Resize', scale=(1000, 600), keep_ratio=True)]
"""
    found = read("MMDetection", mmdetection_state("faster_rcnn"), config=config)
    expected = {
        "min_size": 600,
        "max_size": 1000,
        "backbone.norm_eps": 1e-3,
        "rpn_pre_nms_top_n_test": 1_000_000,
        "rpn_post_nms_top_n_test": 50,
        "score_thresh": 0.2,
        "detections_per_img": 1_000_000,
        "pixels.channel_order": "bgr",
        "pixels.mean": [1 / 255, 2 / 255, 3 / 255],
    }
    assert {name: found.options[name] for name in expected} == expected
    assert found.resize == {"pad_to": 64}
    old = "dict(type='MultiScaleFlipAug', img_scale=(500, 400), transforms=[dict(type='Resize', keep_ratio=True)])"
    found = read("MMDetection", mmdetection_state("faster_rcnn"), config=f"model = dict()\ndata = dict(test={old})")
    assert (found.options["min_size"], found.options["max_size"]) == (400, 500)


def test_old_names_of_p6s_source_and_kept_boxes_are_read() -> None:
    neck = "neck=dict(add_extra_convs=True, extra_convs_on_inputs=False, relu_before_extra_convs=True)"
    state = mmdetection_state("fcos")
    found = read("MMDetection", state, config=f"model = dict({neck}, test_cfg=dict(min_bbox_size=-1))")
    assert (found.options["p6_from"], found.options["p7_relu"]) == ("p5", True)
    assert found.options["detection_rule"] == "mmdetection2"
    restore_detector(found.description, found.state, "model.pth")
    assert any("plain one" in line for line in read("MMDetection", state).warnings)


def test_p6_reads_c5_where_c5_is_as_wide_as_the_pyramid() -> None:
    found = read("Detectron2", detectron2_state("retinanet", channels=512, zeros=True))
    assert found.options["p6_from"] == "c5"


@pytest.mark.parametrize("name", ["head.cls_score.weight", "head.bbox_pred.weight", "backbone.fpn_output5.weight"])
@pytest.mark.parametrize("rows", [0, 3])
def test_broken_weights_are_refused(name: str, rows: int) -> None:
    state = detectron2_state("retinanet", zeros=True)
    state[name] = state[name][:rows] if rows else torch.tensor(1.0)
    with pytest.raises(DistillError, match=r"^model\.pth"):
        build("Detectron2", state)


@pytest.mark.parametrize("version", ["0.6.0", "1.2.0"])
def test_versions_with_other_boxes_are_refused(version: str) -> None:
    content = {"meta": {"mmdet_version": version}, "state_dict": mmdetection_state("retinanet", zeros=True)}
    with pytest.raises(DistillError, match="one pixel wider"):
        read_foreign(content, "model.pth")


def test_half_a_file_is_refused_with_the_missing_tensors() -> None:
    state = detectron2_state("faster_rcnn")
    for name in ("backbone.fpn_output3.weight", "roi_heads.box_head.fc2.bias"):
        del state[name]
    found = read("Detectron2", state)
    with pytest.raises(DistillError, match=r"2 missing: backbone\.fpn\.layer_blocks\.1\.0\.weight"):
        restore_detector(found.description, found.state, "half.pth")
    backbone = {name: value for name, value in state.items() if name.startswith("backbone.bottom_up.")}
    with pytest.raises(DistillError, match="part of a detector"):
        read("Detectron2", backbone)


def test_unknown_names_are_no_foreign_format() -> None:
    assert read_foreign({"state_dict": {"encoder.weight": torch.ones(1)}}, "x.pth") is None
    assert read_foreign([1, 2], "x.pth") is None


def test_caffe2_has_other_names_and_the_background_first() -> None:
    assert renamed("fpn_inner_res4_5_sum_lateral_w") == "fpn_lateral4.weight"
    assert renamed("_[mask]_fcn1_w") == "mask_head.mask_fcn1.weight"
    state = to_detectron2(
        {
            "res_conv1_bn_s": torch.tensor([2.0]),
            "res_conv1_bn_b": torch.tensor([3.0]),
            "conv1_w_momentum": torch.tensor([0.0]),
            "cls_score_b": torch.tensor([0.0, 1.0, 2.0]),
            "bbox_pred_b": torch.arange(8.0),
            "mask_fcn_logits_b": torch.tensor([0.0, 1.0, 2.0]),
        }
    )
    body = "backbone.bottom_up.stem.conv1.norm"
    assert state[f"{body}.weight"].tolist() == [2.0]
    assert state[f"{body}.running_mean"].tolist() == [0.0]
    assert state[f"{body}.running_var"].tolist() == pytest.approx([1 - 1e-5])
    assert state["roi_heads.box_predictor.cls_score.bias"].tolist() == [1.0, 2.0, 0.0]
    assert state["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert state["roi_heads.mask_head.predictor.bias"].tolist() == [1.0, 2.0]
    assert "conv1_w_momentum" not in "".join(state)


def test_a_configuration_is_read_and_never_run(tmp_path: Path) -> None:
    text = (
        "base = 4\nscale = dict(octave=base * 2, lr=-1e-3)\nwild = __import__('os').system('touch x')\n"
        "files = [open('x')]\nname = 'a'\n"
    )
    assert parse_config(text) == {"base": 4, "scale": {"octave": 8, "lr": -1e-3}, "name": "a"}
    assert parse_config("def broken(:") == {}


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_a_hostile_pickle_runs_nothing(form: str, tmp_path: Path) -> None:
    file, proof = tmp_path / "model.pkl", tmp_path / "ran"
    content = {"model": {"a": torch.ones(1).numpy()}, "extra": _Hostile(proof)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(DistillError, match=r"asks to run \w+\.system"):
        load_tensors(file, foreign=True)
    assert not proof.exists()


class _Program(torch.nn.Module):
    """A TorchScript program whose code runs when it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.target)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_torchscript_file_does_not_run(tmp_path: Path) -> None:
    file, proof = tmp_path / "model.pth", tmp_path / "ran"
    torch.jit.save(torch.jit.script(_Program(str(proof))), file)  # type: ignore[no-untyped-call]
    with pytest.raises(DistillError, match="TorchScript"):
        load_tensors(file, foreign=True)
    assert not proof.exists()


@pytest.mark.parametrize(("module", "name"), [("torch", "FloatStorage"), ("torch.storage", "UntypedStorage")])
def test_a_file_changes_no_class_of_torch(module: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    state = b"N}X\x06\x00\x00\x00markedK\x01s\x86b"  # the pair (None, {"marked": 1}), and the instruction to set it
    file.write_bytes(f"\x80\x02c{module}\n{name}\n".encode("latin1") + state + b".")
    with suppress(DistillError):
        load_tensors(file, foreign=True)
    assert not hasattr(torch.FloatStorage, "marked")
    assert not hasattr(torch.UntypedStorage, "marked")


def test_objects_of_unknown_classes_become_placeholders(tmp_path: Path) -> None:
    file = tmp_path / "runner.pth"
    unknown = type("HistoryBuffer", (), {"__module__": __name__})
    globals()["HistoryBuffer"] = unknown
    try:
        torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": {"loss": unknown()}}, file)
    finally:
        del globals()["HistoryBuffer"]
    content = load_tensors(file, foreign=True)
    assert content["state_dict"]["a"].tolist() == [1, 1]
    with pytest.raises(DistillError, match="not a file of tensors"):
        load_tensors(file)


def test_arrays_become_tensors(tmp_path: Path) -> None:
    file = tmp_path / "zoo.pkl"
    array = torch.arange(6.0).view(2, 3).numpy()
    for protocol in (2, 4, 5):
        file.write_bytes(pickle.dumps({"model": {"a": array, "b": array.T.astype(">f4")}, "n": 3}, protocol))
        content = load_tensors(file, foreign=True)
        assert torch.equal(content["model"]["a"], torch.arange(6.0).view(2, 3))
        assert torch.equal(content["model"]["b"], torch.arange(6.0).view(2, 3).T)
    file.write_bytes(pickle.dumps({"model": {"a": torch.arange(6.0).view(2, 3).T}}))
    assert torch.equal(load_tensors(file, foreign=True)["model"]["a"], torch.arange(6.0).view(2, 3).T)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DistillError, match="written completely"):
        load_tensors(file, foreign=True)
