"""The table of detector families, and small detectors with random weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.models import detection

from distill.detectors.base import Detector
from distill.detectors.deimv2 import DEIMv2
from distill.detectors.description import RENAMED_OPTIONS
from distill.detectors.dfine import DFine
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.mask_rcnn import MaskRCNN
from distill.detectors.retinanet import RetinaNet
from distill.detectors.rfdetr import RFDETR
from distill.detectors.rtdetr import RTDETR
from distill.types import Batch, Target


class Family(NamedTuple):
    """One row of the table: what tests have to know of a family. Whoever adds a family adds a row."""

    detector: type[Detector]
    options: str
    """How the names of its model options begin."""
    original: Any
    """The library's own class, with which it is compared."""
    two_stage: bool = False
    needs_masks: bool = False
    """Its own losses need masks in the targets."""
    neck_channels: int | None = None
    """The least that the heads take, where this is more than a small detector has."""
    box_layers: tuple[str, ...] = ()
    """Layers without which fresh boxes are points; the first one's bias is the boxes' extent."""
    equals_torchvision: Mapping[str, Any] = {}
    """Options under which all numbers are torchvision's to the bit."""
    other_results: Mapping[str, Any] = {}
    """Options that change results but no tensor's shape."""


FAMILIES = {
    "faster_rcnn": Family(
        FasterRCNN,
        "frcnn",
        detection.FasterRCNN,
        two_stage=True,
        equals_torchvision={"box_roi_align": "torchvision"},
        other_results={"anchor_ratios": (0.5, 1)},
    ),
    "retinanet": Family(RetinaNet, "retinanet", detection.RetinaNet, other_results={"anchor_ratios": (0.5, 1)}),
    "fcos": Family(
        FCOS,
        "fcos",
        detection.FCOS,
        neck_channels=64,  # the heads' group norm has 32 groups
        box_layers=("head.regression_head.bbox_reg", "head.regression_head.bbox_ctrness"),
        other_results={"center_sampling_radius": 2},
    ),
    "mask_rcnn": Family(MaskRCNN, "mask_rcnn", detection.MaskRCNN, two_stage=True, needs_masks=True),
}


class QueryFamily(NamedTuple):
    """One row of the table of families with queries: the facts that tests need. A new family adds a row.

    They are the set-prediction detectors of transformers. They have no anchors, no NMS and no network of torchvision.
    """

    detector: type[Detector]
    small: Mapping[str, Any]
    """Options of a small detector."""
    parts: tuple[str, str, str, str, str]
    """Its layers of the body, the encoder, the encoder's scores and boxes, and the decoder."""
    processor: str = "RTDetrImageProcessor"
    """The library's own class that makes pixels of images and detections of outputs."""
    images: tuple[int, int] = (96, 128)
    """Height and width of the images of its tests: not square if it takes such."""
    corners: bool = False
    """Its boxes have distributions of their sides."""
    any_points: bool = True
    """Its decoder starts from any points, as `query_points` and `decode` of the View say."""
    groups: bool = False
    """In training it has several groups of queries, and `queries` of the View are those of the first one."""
    random: Mapping[str, Any] = {}
    """Options with which its training draws numbers, if it draws none by default."""
    box_heads: tuple[str, ...] = ()
    """Beginnings of the names of heads whose fresh last layers are 0, so that all boxes are those of their cells."""
    rate: float = 2e-3
    """A learning rate with which it learns one batch by heart."""


_SMALL = {
    "backbone": {"name": "resnet_d", "depth": 10, "width": 0.25},
    **{"neck_channels": 32, "encoder_ffn": 64, "encoder_heads": 4, "encoder_expansion": 0.5},
    **{"decoder_channels": 32, "decoder_layers": 3, "decoder_ffn": 64, "decoder_heads": 4, "decoder_points": 2},
    **{"queries": 20, "denoising": 10, "min_size": 128, "max_size": 128},
}
_PARTS = ("model.encoder", "model.enc_score_head", "model.enc_bbox_head", "model.decoder")
QUERY_FAMILIES = {
    "rtdetr": QueryFamily(RTDETR, _SMALL, ("model.backbone.model", *_PARTS)),
    "dfine": QueryFamily(DFine, _SMALL, ("model.backbone.model", *_PARTS), corners=True),
    "deimv2": QueryFamily(DEIMv2, _SMALL, ("model.conv_encoder.model", *_PARTS), corners=True),
    "rfdetr": QueryFamily(
        RFDETR,
        {
            "backbone": {"name": "dinov2", "depth": 4, "width": 0.17},
            **{"positions": 8, "neck_channels": 32, "neck_blocks": 1},
            **{"decoder_layers": 3, "decoder_ffn": 64, "self_heads": 4, "cross_heads": 4},
            **{"queries": 20, "groups": 3, "min_size": 128, "max_size": 128},
        },
        (
            *("model.backbone.backbone", "model.backbone.projector"),
            *("model.enc_out_class_embed.0", "model.enc_out_bbox_embed.0", "model.decoder"),
        ),
        processor="RfDetrImageProcessor",
        images=(128, 128),
        any_points=False,
        groups=True,
        random={"dropout": 0.1},
        box_heads=("bbox_embed", "model.enc_out_bbox_embed"),
        rate=1e-3,
    ),
}
BOX_FAMILIES = {name: family for name, family in FAMILIES.items() if not family.needs_masks}
SIZES = ((96, 64), (70, 100), (128, 90))
FEW = {"rpn_pre_nms_top_n_train": 60, "rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_train": 50}


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor options. Options of `backbone`, `anchors` and `pixels` may be flat: width, anchor_sizes, mean."""
    result: dict[str, Any] = {}
    for name, value in options.items():
        group, _, key = (name if isinstance(value, dict) else RENAMED_OPTIONS.get(name, name)).partition(".")
        if key:
            result[group] = {**result.get(group, {}), key: value}
        else:
            result[group] = {**result.get(group, {}), **value} if isinstance(value, dict) else value
    return result


def small_options(family: str, two_stage: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Options of a small detector: what its family needs, what its regions need, and then what the test wants."""
    row = FAMILIES[family]
    needed = {"neck_channels": row.neck_channels} if row.neck_channels else {}
    small = {"depth": 10, "width": 0.25, "neck_channels": 16, **needed}
    return nested({**small, **(two_stage if row.two_stage else {}), **options})


def random_detector(family: str, seed: int = 0, **options: Any) -> Any:
    """A small detector whose fresh weights are large enough to tell boxes and classes apart."""
    torch.manual_seed(seed)
    row = FAMILIES[family]
    regions = {**FEW, "head_channels": 32, "rpn_post_nms_top_n_test": 30}
    settings = {"norm": "frozen", **({} if row.neck_channels else {"neck_channels": 32}), **options}
    detector: Any = row.detector(["cat", "dog", "owl"], **small_options(family, regions, **settings))
    for layer in detector.class_layers:
        module = detector.net.get_submodule(layer)
        torch.nn.init.normal_(module.weight, std=0.05)
        torch.nn.init.normal_(module.bias, std=0.5)
    layers = [detector.net.get_submodule(layer) for layer in row.box_layers]
    for module in layers[:1]:
        torch.nn.init.uniform_(module.bias, 1.0, 4.0)
    for module in layers:
        torch.nn.init.normal_(module.weight, std=0.05)
    return detector


def query_detector(family: str, seed: int = 0, classes: Sequence[str] = ("cat", "dog", "owl"), **options: Any) -> Any:
    """A small set-prediction detector with random weights."""
    torch.manual_seed(seed)
    row = QUERY_FAMILIES[family]
    detector: Any = row.detector(classes, **{**row.small, **options})
    if "weights" not in options:
        for name, module in detector.net.named_modules():
            if name.startswith(row.box_heads) and hasattr(module, "layers"):
                torch.nn.init.normal_(module.layers[-1].weight, std=0.05)
    return detector


def random_query_detector(family: str, seed: int = 0, **options: Any) -> Any:
    """A small set-prediction detector whose queries have unlike boxes and distributions. Fresh ones have equal ones."""
    detector = query_detector(family, seed, **options)
    with torch.no_grad():
        for name, parameter in detector.net.named_parameters():
            if "bbox_embed" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return detector


def query_batch(family: str, count: int = 3) -> Batch:
    """Images for a small detector of the family; the second one has no boxes."""
    return square_batch((QUERY_FAMILIES[family].images,) * count)


def square_batch(sizes: tuple[tuple[int, int], ...] = ((96, 128),) * 3, seed: int = 1) -> Batch:
    """Images of one size, without padding; the second one has no boxes."""
    generator, targets = torch.Generator().manual_seed(seed), []
    height, width = sizes[0]
    images = torch.randint(0, 256, (len(sizes), 3, height, width), generator=generator, dtype=torch.uint8)
    for index in range(len(sizes)):
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        side = 8 + torch.rand(3, 2, generator=generator) * torch.tensor([width, height]) * 0.4
        keep = 0 if index == 1 else 3
        targets.append(Target(torch.cat([corner, corner + side], dim=1)[:keep], torch.tensor([1, 2, 3])[:keep]))
    return Batch(images, tuple(sizes), tuple(sizes), tuple(targets), tuple(range(len(sizes))))


def padded_batch(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 1) -> Batch:
    """Images of several sizes in one padded tensor; the second one has no boxes."""
    generator = torch.Generator().manual_seed(seed)
    height = math.ceil(max(h for h, _ in sizes) / 32) * 32
    width = math.ceil(max(w for _, w in sizes) / 32) * 32
    images = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    targets = []
    for index, (h, w) in enumerate(sizes):
        images[index, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([w, h]) * 0.5
        side = 8 + torch.rand(3, 2, generator=generator) * torch.tensor([w, h]) * 0.4
        boxes, labels = torch.cat([corner, corner + side], dim=1), torch.tensor([1, 2, 3])
        keep = 0 if index == 1 else 3
        targets.append(Target(boxes[:keep], labels[:keep]))
    return Batch(images, tuple(sizes), tuple(sizes), tuple(targets), tuple(range(len(sizes))))


def gradients(detector: Detector) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in detector.net.named_parameters() if p.grad is not None}
    detector.zero_grad()
    return found


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Both have the same names and the same values, bit for bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def assert_order_changes_nothing(detector: Detector, data: Batch) -> None:
    """The stages of a set-prediction detector's View may be read in any order."""
    buffers = {name: value.clone() for name, value in detector.net.named_buffers()}
    reference: Any = None
    for order in itertools.permutations(("losses", "queries", "class_logits")):
        detector.net.load_state_dict(buffers, strict=False)
        torch.manual_seed(3)
        view: Any = detector.view(data)
        for stage in order:
            getattr(view, stage)
        sum(view.losses.values()).backward()
        values = dict(view.losses) | {"boxes": view.queries[-1].boxes}, gradients(detector)
        reference = reference or values
        assert_same(values[0], reference[0])
        assert_same(values[1], reference[1])


def count_calls(detector: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    net = detector.net
    parts = {"body": net.backbone.body["conv1"], "fpn": net.backbone.fpn}
    if "rois" in detector.spec.outputs:
        parts |= {"rpn": net.rpn.head, "pool": net.roi_heads.box_roi_pool, "box": net.roi_heads.box_head}
    else:
        parts |= {"class": net.head.classification_head.cls_logits, "box": net.head.regression_head.bbox_reg}
        parts |= {"trunk": net.head.regression_head.conv, "pool": detector.pool}
        parts |= {"centerness": net.head.regression_head.bbox_ctrness} if "centerness" in detector.spec.outputs else {}
    counts = dict.fromkeys(parts, 0)

    def counting(name: str, forward: Any) -> Any:
        def run(*args: Any) -> Any:
            counts[name] += 1
            return forward(*args)

        return run

    for name, part in parts.items():
        monkeypatch.setattr(part, "forward", counting(name, part.forward))
    return counts
