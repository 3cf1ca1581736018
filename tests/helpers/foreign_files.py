"""State dicts as Detectron2 and MMDetection write them, with random values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Entry = tuple[str, tuple[int, ...]]
STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def detectron2_state(
    family: str,
    classes: int = 3,
    depth: int = 18,
    channels: int = 64,
    head: int = 32,
    groups: tuple[int, int] = (1, 64),
    zeros: bool = False,
) -> dict[str, Tensor]:
    """A detector of Detectron2. `zeros` leaves out the random values, which take time."""
    entries: list[Entry] = []
    two_stage, outputs = family in ("faster_rcnn", "mask_rcnn"), _outputs(depth)
    body = "backbone.bottom_up"
    entries += [(f"{body}.stem.conv1.weight", (64, 3, 7, 7)), *_norm(f"{body}.stem.conv1.norm", 64)]
    for stage, block, parts, shortcut in _blocks(depth, groups):
        name = f"{body}.res{stage + 1}.{block}"
        for part, shape in {**parts, **({"shortcut": shortcut} if shortcut else {})}.items():
            entries += [(f"{name}.{part}.weight", shape), *_norm(f"{name}.{part}.norm", shape[0])]
    for level in range(2 if two_stage else 3, 6):
        entries += _layer(f"backbone.fpn_lateral{level}", (channels, outputs[level - 2], 1, 1))
        entries += _layer(f"backbone.fpn_output{level}", (channels, channels, 3, 3))
    if two_stage:
        rpn = "proposal_generator.rpn_head"
        entries += _layer(f"{rpn}.conv", (channels, channels, 3, 3))
        entries += _layer(f"{rpn}.objectness_logits", (3, channels, 1, 1))
        entries += _layer(f"{rpn}.anchor_deltas", (12, channels, 1, 1))
        entries += _layer("roi_heads.box_head.fc1", (head, channels * 49))
        entries += _layer("roi_heads.box_head.fc2", (head, head))
        entries += _layer("roi_heads.box_predictor.cls_score", (classes + 1, head))
        entries += _layer("roi_heads.box_predictor.bbox_pred", (4 * classes, head))
    else:
        source = outputs[3] if family == "retinanet" else channels
        entries += _layer("backbone.top_block.p6", (channels, source, 3, 3))
        entries += _layer("backbone.top_block.p7", (channels, channels, 3, 3))
        step, anchors = (2, 9) if family == "retinanet" else (3, 1)
        for tower in ("cls_subnet", "bbox_subnet"):
            for layer in range(4):
                entries += _layer(f"head.{tower}.{layer * step}", (channels, channels, 3, 3))
                entries += _layer(f"head.{tower}.{layer * step + 1}", (channels,)) if step == 3 else []
        entries += _layer("head.cls_score", (anchors * classes, channels, 3, 3))
        entries += _layer("head.bbox_pred", (anchors * 4, channels, 3, 3))
        entries += _layer("head.ctrness", (1, channels, 3, 3)) if family == "fcos" else []
    if family == "mask_rcnn":
        for layer in range(1, 5):
            entries += _layer(f"roi_heads.mask_head.mask_fcn{layer}", (channels, channels, 3, 3))
        entries += [("roi_heads.mask_head.deconv.weight", (channels, channels, 2, 2))]
        entries += [("roi_heads.mask_head.deconv.bias", (channels,))]
        entries += _layer("roi_heads.mask_head.predictor", (classes, channels, 1, 1))
    return _filled(entries, zeros)


def mmdetection_state(
    family: str,
    classes: int = 3,
    depth: int = 18,
    channels: int = 64,
    head: int = 32,
    groups: tuple[int, int] = (1, 64),
    conv_bias: bool = False,
    zeros: bool = False,
) -> dict[str, Tensor]:
    """A detector of MMDetection. `conv_bias` is that of FCOS's towers."""
    two_stage, outputs = family in ("faster_rcnn", "mask_rcnn"), _outputs(depth)
    count = ("num_batches_tracked", ())
    entries: list[Entry] = [("backbone.conv1.weight", (64, 3, 7, 7)), *_norm("backbone.bn1", 64)]
    entries += [(f"backbone.bn1.{count[0]}", ())]
    for stage, block, parts, shortcut in _blocks(depth, groups):
        name = f"backbone.layer{stage}.{block}"
        for part, shape in parts.items():
            norm = f"{name}.bn{part[-1]}"
            entries += [(f"{name}.{part}.weight", shape), *_norm(norm, shape[0]), (f"{norm}.{count[0]}", ())]
        if shortcut:
            norm = f"{name}.downsample.1"
            entries += [
                (f"{name}.downsample.0.weight", shortcut),
                *_norm(norm, shortcut[0]),
                (f"{norm}.{count[0]}", ()),
            ]
    first = 0 if two_stage else 1
    for index, inputs in enumerate(outputs[first:]):
        entries += _layer(f"neck.lateral_convs.{index}.conv", (channels, inputs, 1, 1))
        entries += _layer(f"neck.fpn_convs.{index}.conv", (channels, channels, 3, 3))
    if two_stage:
        entries += _layer("rpn_head.rpn_conv", (channels, channels, 3, 3))
        entries += _layer("rpn_head.rpn_cls", (3, channels, 1, 1))
        entries += _layer("rpn_head.rpn_reg", (12, channels, 1, 1))
        entries += _layer("roi_head.bbox_head.shared_fcs.0", (head, channels * 49))
        entries += _layer("roi_head.bbox_head.shared_fcs.1", (head, head))
        entries += _layer("roi_head.bbox_head.fc_cls", (classes + 1, head))
        entries += _layer("roi_head.bbox_head.fc_reg", (4 * classes, head))
    else:
        source = outputs[3] if family == "retinanet" else channels
        entries += _layer("neck.fpn_convs.3.conv", (channels, source, 3, 3))
        entries += _layer("neck.fpn_convs.4.conv", (channels, channels, 3, 3))
        for tower in ("cls_convs", "reg_convs"):
            for layer in range(4):
                conv = _layer(f"bbox_head.{tower}.{layer}.conv", (channels, channels, 3, 3))
                entries += conv if family == "retinanet" or conv_bias else conv[:1]
                entries += _layer(f"bbox_head.{tower}.{layer}.gn", (channels,)) if family == "fcos" else []
    if family == "retinanet":
        entries += _layer("bbox_head.retina_cls", (9 * classes, channels, 3, 3))
        entries += _layer("bbox_head.retina_reg", (36, channels, 3, 3))
    if family == "fcos":
        entries += _layer("bbox_head.conv_cls", (classes, channels, 3, 3))
        entries += _layer("bbox_head.conv_reg", (4, channels, 3, 3))
        entries += _layer("bbox_head.conv_centerness", (1, channels, 3, 3))
        entries += [(f"bbox_head.scales.{level}.scale", ()) for level in range(5)]
    if family == "mask_rcnn":
        for layer in range(4):
            entries += _layer(f"roi_head.mask_head.convs.{layer}.conv", (channels, channels, 3, 3))
        entries += [("roi_head.mask_head.upsample.weight", (channels, channels, 2, 2))]
        entries += [("roi_head.mask_head.upsample.bias", (channels,))]
        entries += _layer("roi_head.mask_head.conv_logits", (classes, channels, 1, 1))
    return _filled(entries, zeros)


def _outputs(depth: int) -> list[int]:
    return [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]


def _layer(name: str, shape: tuple[int, ...]) -> list[Entry]:
    return [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]


def _norm(name: str, channels: int) -> list[Entry]:
    return [(f"{name}.{part}", (channels,)) for part in NORM]


def _blocks(
    depth: int, groups: tuple[int, int]
) -> Iterator[tuple[int, int, dict[str, tuple[int, ...]], tuple[int, ...] | None]]:
    """Stage, block, convolutions and shortcut of every block."""
    inputs, outputs = 64, _outputs(depth)
    for stage, count in enumerate(STAGES[depth], start=1):
        planes, wide = 64 * 2 ** (stage - 1), outputs[stage - 1]
        middle = planes * groups[1] // 64 * groups[0]
        for block in range(count):
            if depth == 18:
                parts = {"conv1": (planes, inputs, 3, 3), "conv2": (planes, planes, 3, 3)}
            else:
                parts = {
                    "conv1": (middle, inputs, 1, 1),
                    "conv2": (middle, middle // groups[0], 3, 3),
                    "conv3": (wide, middle, 1, 1),
                }
            yield stage, block, parts, (wide, inputs, 1, 1) if inputs != wide else None
            inputs = wide


def _filled(entries: list[Entry], zeros: bool) -> dict[str, Tensor]:
    if zeros:
        return {name: torch.zeros(()).expand(shape) for name, shape in entries}
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in entries:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith(("running_var", "norm.weight", "scale")) or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        else:
            fan = max(1, torch.Size(shape[1:]).numel())
            state[name] = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else (2 / fan) ** 0.5)
    return state
