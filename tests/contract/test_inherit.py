"""init=inherit: what is taken from the teacher, what is left, and what is refused."""

from __future__ import annotations

import pytest
import torch

from distill.detectors.inherit import inherit
from distill.types import DistillError
from helpers.detectors import BOX_FAMILIES, random_detector


@pytest.mark.parametrize("family", BOX_FAMILIES)
def test_neck_and_heads_are_the_teacher_s_and_the_body_is_not(family: str) -> None:
    student, teacher = random_detector(family, seed=1), random_detector(family, seed=2)
    before = {name: value.clone() for name, value in student.net.state_dict().items()}
    lines = inherit(student, teacher)
    teacher_state = teacher.net.state_dict()
    for name, value in student.net.state_dict().items():
        assert torch.equal(value, (before if name.startswith("backbone.body.") else teacher_state)[name]), name
    counts = [line.split(": ")[2] for line in lines]
    assert len(lines) > 2
    assert all(count.split(" of ")[0] == count.split(" of ")[1] for count in counts)
    teacher.net.state_dict()[next(name for name in teacher_state if "fpn" in name)].fill_(7)
    assert not any((value == 7).all() for value in student.net.state_dict().values() if value.numel() > 3)


def test_other_shapes_stay_fresh_and_are_named() -> None:
    student, teacher = (
        random_detector("faster_rcnn", seed=1),
        random_detector("faster_rcnn", seed=2, depth=50, head_channels=64),
    )
    before = student.net.roi_heads.box_head.fc6.weight.clone()
    lines = inherit(student, teacher)
    assert torch.equal(student.net.roi_heads.box_head.fc6.weight, before)
    assert torch.equal(student.net.rpn.head.cls_logits.weight, teacher.net.rpn.head.cls_logits.weight)
    (fpn,) = [line for line in lines if "backbone.fpn" in line]
    assert "8 of 16; fresh: fpn.inner" in fpn.replace("backbone.fpn.inner", "fpn.inner")
    (heads,) = [line for line in lines if "roi_heads.box_head" in line]
    assert "fresh: roi_heads.box_head.fc6.weight" in heads


def test_classes_are_matched_by_name() -> None:
    student, teacher = random_detector("faster_rcnn", seed=1), random_detector("faster_rcnn", seed=2)
    renamed = type(teacher)(
        ["owl", "bat", "cat", "dog"], **{k: v for k, v in teacher.options.items() if k != "classes"}
    )
    inherit(student, renamed)
    student_layer, teacher_layer = (
        student.net.roi_heads.box_predictor.cls_score,
        renamed.net.roi_heads.box_predictor.cls_score,
    )
    for row, other in ((0, 0), (1, 3), (2, 4), (3, 1)):
        assert torch.equal(student_layer.weight[row], teacher_layer.weight[other])
    fewer = type(teacher)(["cat", "dog"], **{k: v for k, v in teacher.options.items() if k != "classes"})
    with pytest.raises(DistillError, match=r"\['owl'\] of .*set init=scratch"):
        inherit(student, fewer)


def test_what_cannot_be_inherited_is_refused() -> None:
    with pytest.raises(DistillError, match=r"pyramids of equal strides, got the student's \[4, 8.*init=scratch"):
        inherit(random_detector("faster_rcnn"), random_detector("retinanet"))
    thin = {"rpn_post_nms_top_n_test": 30, "anchor_ratios": [1.0], "head_channels": 16}
    with pytest.raises(DistillError, match=r"has \[16\] channels, the teacher's \[32\]"):
        inherit(
            random_detector("faster_rcnn", neck_channels=16, **thin, **{"norm": "frozen"}),
            random_detector("faster_rcnn", head_channels=48),
        )
