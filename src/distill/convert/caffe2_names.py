"""Names of Caffe2 (the first Detectron, and ImageNet weights in Detectron2's model zoo) -> names of Detectron2.

Source: `convert_basic_c2_names` and `convert_c2_detectron_names` in detectron2/checkpoint/c2_model_loading.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

EXACT = {"pred_b": "linear_b", "pred_w": "linear_w"}

STEPS: tuple[tuple[str, str], ...] = (
    (r"_", "."),
    (r"\.b$", ".bias"),
    (r"\.w$", ".weight"),
    (r"bn\.s$", "norm.weight"),
    (r"bn\.bias$", "norm.bias"),
    (r"bn\.rm", "norm.running_mean"),
    (r"bn\.running\.mean$", "norm.running_mean"),
    (r"bn\.riv$", "norm.running_var"),
    (r"bn\.running\.var$", "norm.running_var"),
    (r"bn\.gamma$", "norm.weight"),
    (r"bn\.beta$", "norm.bias"),
    (r"gn\.s$", "norm.weight"),
    (r"gn\.bias$", "norm.bias"),
    (r"^res\.conv1\.norm\.", "conv1.norm."),
    (r"^conv1\.", "stem.conv1."),
    (r"\.branch1\.", ".shortcut."),
    (r"\.branch2a\.", ".conv1."),
    (r"\.branch2b\.", ".conv2."),
    (r"\.branch2c\.", ".conv3."),
    (r"conv\.rpn\.fpn2", "proposal_generator.rpn_head.conv"),
    (r"conv\.rpn", "proposal_generator.rpn_head.conv"),
    (r"rpn\.bbox\.pred\.fpn2", "proposal_generator.rpn_head.anchor_deltas"),
    (r"rpn\.cls\.logits\.fpn2", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn\.bbox\.pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"rpn\.cls\.logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"^bbox\.pred", "bbox_pred"),
    (r"^cls\.score", "cls_score"),
    (r"^fc6\.", "box_head.fc1."),
    (r"^fc7\.", "box_head.fc2."),
    (r"^fpn\.inner\.res(\d)\..*\.sum(\.lateral)?\.", r"fpn_lateral\1."),
    (r"^fpn\.res(\d)\..*\.sum\.", r"fpn_output\1."),
    (r"^\.\[mask\]\.fcn", "mask_head.mask_fcn"),
    (r"^mask\.fcn\.logits", "mask_head.predictor"),
    (r"^conv5\.mask", "mask_head.deconv"),
)
"""Regular expression -> replacement, in this order."""

PLACES: tuple[tuple[str, str], ...] = (
    (r"^(stem|res\d)\.", r"backbone.bottom_up.\g<0>"),
    (r"^fpn_", r"backbone.\g<0>"),
    (r"^(box_head|mask_head)\.", r"roi_heads.\g<0>"),
    (r"^(cls_score|bbox_pred)\.", r"roi_heads.box_predictor.\g<0>"),
)
"""The place of a renamed tensor in a whole detector."""

FUSED_VARIANCE = 1 - 1e-5
"""Running variance of a norm that was fused into scale and bias: with an epsilon of 1e-5 the divisor is 1."""


def renamed(name: str) -> str:
    """Detectron2's name of a tensor, without its place in a detector."""
    name = EXACT.get(name, name)
    for pattern, replacement in STEPS:
        name = re.sub(pattern, replacement, name)
    return name


def is_caffe2(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors have Caffe2's names."""
    return "conv1_w" in names or any(re.match(r"res\d_\d+_branch", name) for name in names)


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a whole detector: names, and rows of classes.

    Caffe2 has the background first, and gives it box deltas and a mask. Detectron2 has it last, with scores only.
    """
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("_momentum") or name in ("lr", "weight_order"):
            continue
        new = renamed(name)
        value = changed_rows(new, value)
        for pattern, replacement in PLACES:
            new = re.sub(pattern, replacement, new)
        result[new] = value
    for name in [name for name in result if name.endswith("norm.weight")]:
        stem = name.removesuffix("weight")
        result.setdefault(f"{stem}running_mean", torch.zeros_like(result[name]))
        result.setdefault(f"{stem}running_var", torch.full_like(result[name], FUSED_VARIANCE))
    return result


def changed_rows(name: str, rows: Tensor) -> Tensor:
    """The rows of a renamed tensor in Detectron2's order."""
    if name.startswith("bbox_pred."):
        return rows[4:]
    if name.startswith("mask_head.predictor."):
        return rows[1:]
    return torch.cat([rows[1:], rows[:1]]) if name.startswith("cls_score.") else rows
