"""A View made of given tensors, so that a loss can be tried without a detector. It remembers which stages were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.detectors.faster_rcnn import FasterRCNNView
from distill.detectors.retinanet import RetinaNetView
from distill.types import AnchorTargets, Batch, Detections, DetectorSpec, Regions, Target

STRIDES = (4, 8, 16, 32, 64)
PYRAMIDS = {"body", "neck", "class_logits", "objectness", "deltas", "side_logits", "tower_classes", "tower_boxes"}


def spec(
    classes: Sequence[str] = ("cat", "dog", "cow", "hen"),
    neck: int = 6,
    body: Sequence[int] = (3, 4, 5, 6),
    strides: Sequence[int] = STRIDES,
    two_stage: bool = True,
    anchors: int = 3,
) -> DetectorSpec:
    return DetectorSpec(
        family="faster_rcnn" if two_stage else "retinanet",
        outputs=(FasterRCNNView if two_stage else RetinaNetView).outputs,
        classes=tuple(classes),
        body=dict(zip((4, 8, 16, 32), body, strict=True)),
        neck=dict.fromkeys(strides, neck),
        anchors=dict.fromkeys(strides, anchors),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        norm="frozen",
    )


def batch(boxes: Sequence[Sequence[Sequence[float]]], height: int = 64, width: int = 64, first_id: int = 7) -> Batch:
    """Images with these boxes, all of class 1."""
    targets = [
        Target(torch.tensor(corners).reshape(-1, 4), torch.ones(len(corners), dtype=torch.int64)) for corners in boxes
    ]
    sizes = ((height, width),) * len(boxes)
    images = torch.zeros(len(boxes), 3, height, width, dtype=torch.uint8)
    return Batch(images, sizes, sizes, tuple(targets), tuple(range(first_id, first_id + len(boxes))))


class FakeView:
    """A View of given stages, in the shapes of `distill.types.View`.

    `stages` holds any of body, neck, anchors, class_logits, objectness, deltas, anchor_targets, proposals, rois and
    losses, and the results of roi_features, roi_logits, roi_boxes and predictions.
    """

    def __init__(self, batch: Batch, spec: DetectorSpec, **stages: Any) -> None:
        self.batch, self.spec, self.stages = batch, spec, stages
        self.reads: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.stages:
            raise AttributeError(f"this FakeView was given no stage '{name}'")
        self.reads.add(name)
        return self.stages[name]

    def roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        self.reads.add("roi_features")
        return self.stages["roi_features"]

    def roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        self.reads.add("roi_logits")
        return self.stages["roi_logits"]

    def predictions(self, score: float | None = None, nms: float | None = None, top: int | None = None) -> Any:
        self.reads.add("predictions")
        return self.stages["predictions"]

    def roi_boxes(self, boxes: Sequence[Tensor]) -> Tensor:
        self.reads.add("roi_boxes")
        return self.stages["roi_boxes"]

    def anchor_boxes(self, deltas: Tensor) -> Tensor:
        """Deltas move the corners of the anchors, in pixels."""
        return torch.cat(list(self.stages["anchors"].values())) + deltas

    def tower_features(self, branch: str, depth: int) -> Any:
        self.reads.add("tower_features")
        return self.stages[f"tower_{branch}"]

    def finish_tower(self, branch: str, depth: int, features: Any) -> Any:
        """A linear layer, ``head_classes`` or ``head_boxes`` (channels out, channels in)."""
        weight = self.stages[f"head_{branch}"]
        with torch.autocast("cpu", enabled=False):
            return {at: torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x) for at, x in features.items()}

    def mapped(self, change: Any) -> FakeView:
        """The same view with `change` applied to every map, pooled feature and logit of a network."""
        stages = dict(self.stages)
        for name in PYRAMIDS & stages.keys():
            stages[name] = {stride: change(x) for stride, x in stages[name].items()}
        if "roi_logits" in stages:
            stages["roi_logits"] = tuple(change(x) for x in stages["roi_logits"])
        if "roi_features" in stages:
            stages["roi_features"] = change(stages["roi_features"])
        return type(self)(self.batch, self.spec, **stages)

    def leaves(self) -> list[Tensor]:
        """The tensors that a gradient could reach."""
        maps = [x for name in sorted(PYRAMIDS & self.stages.keys()) for x in self.stages[name].values()]
        regions = [*self.stages.get("roi_logits", ()), self.stages.get("roi_features")]
        return [*maps, *(x for x in regions if x is not None)]


def random_view(
    batch: Batch, spec: DetectorSpec, seed: int, regions: int = 6, dtype: torch.dtype = torch.float64
) -> FakeView:
    """Every stage drawn at random, image by image, so that a longer batch only adds images. A third of the regions, or
    none where the image has no boxes, is positive."""
    height, width = batch.sizes[0]
    generators = [torch.Generator().manual_seed(1000 * seed + image) for image in batch.ids]

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator, dtype=dtype) for generator in generators])

    def size(stride: int) -> tuple[int, int]:
        return -(-height // stride), -(-width // stride)

    body = {stride: draw(channels, *size(stride)) for stride, channels in spec.body.items()}
    neck = {stride: draw(channels, *size(stride)) for stride, channels in spec.neck.items()}
    classes = len(spec.classes) + 1
    logits = draw(regions, classes).flatten(0, 1), draw(regions, classes * 4).flatten(0, 1)
    boxes = [corners(regions, height, width, generator) for generator in generators]
    labels = [(torch.arange(regions) % 3 == 0).long() * bool(len(target.boxes)) for target in batch.targets]
    grid = {stride: anchors(*size(stride), stride, count) for stride, count in spec.anchors.items()}
    dense = {stride: draw(count * 4, *size(stride)) for stride, count in spec.anchors.items()}
    outputs = 1 if "rois" in spec.outputs else classes - 1
    scores = {stride: draw(count * outputs, *size(stride)) for stride, count in spec.anchors.items()}
    deltas = draw(regions, 4).float()
    moves = draw(regions, classes, 4).float()
    return FakeView(
        batch,
        spec,
        body=body,
        neck=neck,
        anchors=grid,
        deltas=dense,
        **{("objectness" if "rois" in spec.outputs else "class_logits"): scores},
        anchor_targets=_anchor_targets(batch, sum(map(len, grid.values())), outputs, draw),
        proposals=boxes,
        predictions=[Detections(corners, torch.ones(regions), torch.ones(regions).long()) for corners in boxes],
        rois=Regions(boxes, labels, [box + 1 for box in boxes], list(deltas)),
        roi_features=draw(regions, next(iter(spec.neck.values())), 7, 7).flatten(0, 1),
        roi_logits=logits,
        roi_boxes=(torch.stack(boxes)[:, :, None] + moves).flatten(0, 1),
    )


def _anchor_targets(batch: Batch, count: int, outputs: int, draw: Any) -> AnchorTargets:
    """Of seven anchors two are positive (if the image has boxes), four negative (half of them sampled), one ignored."""
    kind = torch.arange(count) % 7
    labels = torch.where(kind < 2, 1 + torch.arange(count) % outputs, torch.where(kind == 6, -1, 0))
    rows = [labels if len(target.boxes) else labels.clamp(max=0) for target in batch.targets]
    stacked = torch.stack(rows)
    return AnchorTargets(stacked, draw(count, 4).float(), (stacked >= 0) & (kind != 5) & (kind != 4))


def corners(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` boxes inside the image, from 2 pixels on."""
    low = torch.rand(count, 2, generator=generator) * torch.tensor([width - 4.0, height - 4.0])
    high = low + 2 + torch.rand(count, 2, generator=generator) * (torch.tensor([width - 2.0, height - 2.0]) - low)
    return torch.cat([low, high], dim=1)


def anchors(height: int, width: int, stride: int, count: int) -> Tensor:
    """(H*W*count, 4), rows in the order (row, column, anchor), around cell corners, of growing size and elongation."""
    rows = []
    for row in range(height):
        for column in range(width):
            for anchor in range(count):
                w, h = 2.0 * stride * (1 + anchor), 3.0 * stride
                rows.append(
                    [column * stride - w / 2, row * stride - h / 2, column * stride + w / 2, row * stride + h / 2]
                )
    return torch.tensor(rows)


def equal_views(view: FakeView) -> FakeView:
    """A teacher that is its student's twin."""
    return type(view)(view.batch, replace(view.spec), **view.mapped(torch.clone).stages)
