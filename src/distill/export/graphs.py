"""The computation of a detector from pixels to detections as one traceable module, and its dense part alone.

A graph runs a View whose sizes are tensors, so a file computes the operations of the evaluation, in every family.
torch's tracer records these operations with symbolic sizes, so one file works for images of all sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks, maskrcnn_inference
from torchvision.ops import boxes as box_ops

from distill.detectors.base import Detector
from distill.detectors.detection_rules import finish
from distill.detectors.view import temporarily
from distill.export.query_graphs import NO_TARGET, DenseQueryGraph, FixedPositions, TracedQueryView, image_size
from distill.export.resize_graph import resize_pixels, resized_sides
from distill.types import Batch, Detections, DistillError


class TracedView:
    """Mixin that replaces the parts of a View that depend on the size of an image by traceable operations.

    In the list of base classes, the mixin precedes the family's View. ``batch.images`` is not padded.
    """

    pad_to: ClassVar[int] = 1
    """The sides of the padded image are multiples of this number of pixels."""
    sides: Tensor | None = None
    """(B, 2) heights and widths of the images in their canvases. None: the canvas is the image."""

    @functools.cached_property
    def images(self) -> Tensor:
        """Normalized images (B, 3, H, W) with zero padding."""
        view: Any = self
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (view.spec.mean, view.spec.std))
        pixels = view.batch.images
        if view.detector.options["pixels"]["channel_order"] == "bgr":
            pixels = pixels.flip(1)
        images = (pixels.to(torch.float32) / 255 - mean) / std
        height, width = images.shape[-2:]
        if self.sides is not None:
            rows = torch.arange(height)[None] < self.sides[:, :1]
            columns = torch.arange(width)[None] < self.sides[:, 1:]
            images = images * (rows[:, None, :, None] & columns[:, None, None, :])
        if self.pad_to == 1:
            return cast(Tensor, images)
        bottom, right = ((side + self.pad_to - 1) // self.pad_to * self.pad_to - side for side in (height, width))
        return F.pad(images, (0, right, 0, bottom))

    @functools.cached_property
    def anchors(self) -> dict[int, Tensor]:
        """Stride -> (H*W*A, 4) float32. The sizes of the maps are read from the maps."""
        view: Any = self
        maps = list(view.neck.values())
        height, width = self.images.shape[-2:]
        flat = view.generator(ImageList(self.images, [(height, width)]), maps)[0]
        counts = [x.shape[2] * x.shape[3] * a for x, a in zip(maps, view.spec.anchors.values(), strict=True)]
        return dict(zip(view.spec.neck, flat.split(counts), strict=True))


class TracedSetView(TracedQueryView, TracedView):
    """A traced View of a set-prediction detector."""


class TracedMaskView(TracedView):
    """A traced View with masks."""

    @functools.cached_property
    def detections(self) -> list[Detections]:
        """Detections with masks, in pixels of the original images."""
        view: Any = self
        predictions = view.predictions()
        logits = view.mask_logits([image.boxes for image in predictions])
        cells = maskrcnn_inference(logits, [image.labels for image in predictions])
        rows = zip(view.enlarged(predictions), cells, view.batch.original_sizes, strict=True)
        into_image = paste_masks if view.rule == "torchvision" else paste_sampled_masks
        return [
            finish(image._replace(masks=into_image(masks, image.boxes, *size)), view.rule)
            for image, masks, size in rows
        ]


def paste_masks(cells: Tensor, boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Resize mask probabilities (N, 1, M, M) into their boxes (N, 4); return masks (N, height, width) bool.

    The result is that of torchvision's `paste_masks_in_image` above 0.5. This function uses two matrix products,
    because bilinear interpolation is linear along each axis. The exported graph has no loop over the masks, and N may
    be 0.
    """
    padded, scale = expand_masks(cells, 1)
    corners = expand_boxes(boxes, scale).to(torch.int64)
    side = padded.shape[-1]

    def weights(low: Tensor, high: Tensor, length: Any) -> Tensor:
        """(N, length, M): the weight of each cell at each pixel of an axis; 0 outside of the box."""
        size = (high - low + 1).clamp(min=1)[:, None]
        pixel = torch.arange(length)[None] - low[:, None]
        source = ((pixel + 0.5) * (side / size.to(torch.float32)) - 0.5).clamp(0, side - 1)
        inside = (pixel >= 0) & (pixel < size)
        distance = (source[..., None] - torch.arange(side)).abs()
        return cast(Tensor, (1 - distance).clamp(min=0) * inside[..., None])

    x1, y1, x2, y2 = corners.unbind(1)
    rows, columns = weights(y1, y2, height), weights(x1, x2, width)
    return cast(Tensor, rows @ padded[:, 0] @ columns.transpose(1, 2) > 0.5)


def paste_sampled_masks(cells: Tensor, boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Sample mask probabilities (N, 1, M, M) at the pixel centers; return masks (N, height, width) bool.

    The result is that of `detection_rules.paste_sampled`, as two matrix products, see `paste_masks`.
    """
    side = cells.shape[-1]

    def weights(low: Tensor, high: Tensor, length: Any) -> Tensor:
        """(N, length, M): the weight of each cell at each pixel of an axis; 0 for a box without area."""
        size = (high - low)[:, None]
        center = torch.arange(length)[None] + 0.5 - low[:, None]
        source = center / size.clamp(min=torch.finfo(torch.float32).eps) * side - 0.5
        distance = (source[..., None] - torch.arange(side)).abs()
        return (1 - distance).clamp(min=0) * (size > 0)[..., None]

    x1, y1, x2, y2 = boxes.unbind(1)
    rows, columns = weights(y1, y2, height), weights(x1, x2, width)
    return rows @ cells[:, 0] @ columns.transpose(1, 2) >= 0.5


def clip_boxes(boxes: Tensor, size: tuple[Any, Any]) -> Tensor:
    """Clip boxes (..., 4) to an image of (height, width) as torchvision's `clip_boxes_to_image` does.

    torchvision's function ends with a reshape, which fails in onnxruntime if there are no boxes.
    """
    height, width = (torch.as_tensor(side).to(boxes.dtype) for side in size)
    x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
    corners = [torch.minimum(x1, width), torch.minimum(y1, height), torch.minimum(x2, width), torch.minimum(y2, height)]
    return torch.stack(corners, dim=-1)


class FullGraph(nn.Module):
    """A detector from an image file's pixels to its detections.

    Input: (H, W, 3) uint8 RGB, any size. Outputs: boxes (N, 4) xyxy in pixels of the input, scores (N,), labels (N,)
    from 1, and with a mask head masks (N, H, W) bool.

    Args:
        detector: in evaluation mode, on the CPU.

    Raises:
        DistillError: the detector has a part that cannot be traced.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.has_masks = "mask_logits" in detector.spec.outputs
        self.square = image_size(detector) if has_queries(detector) else None
        self.positions = None if self.square is None else FixedPositions(detector, self.square)
        self.view_class = traced_view(detector, detector.resize.pad_to if self.square is None else 1)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["boxes", "scores", "labels", *(["masks"] if self.has_masks else [])]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the detections in an image (H, W, 3)."""
        limits = self.detector.options["min_size"], self.detector.options["max_size"]
        original = torch._shape_as_tensor(image)[:2]
        height, width = resized_sides(original, *limits) if self.square is None else map(torch.tensor, self.square)
        pixels = image.permute(2, 0, 1)[None].to(torch.float32)
        pixels = resize_pixels(pixels, height, width, self.detector.resize.antialias).to(torch.uint8)
        size: Any = (height, width)
        if self.square is not None:
            pixels, size = pixels.reshape(1, 3, *self.square), self.square  # later sizes are numbers in the graph
        view = self.view_class(self.detector, _batch(pixels, size, original.unbind()), False, True, None)
        fixed = nullcontext() if self.positions is None else self.positions.applied()
        with fixed, temporarily(box_ops, clip_boxes_to_image=clip_boxes):
            found: tuple[Tensor, ...] = view.detections[0]
        return found if self.has_masks else found[:3]


class Canvas(NamedTuple):
    """The fixed size of the images of a dense graph."""

    height: int
    width: int


class DenseGraph(nn.Module):
    """The part of a detector that runs on every cell: what engines with fixed shapes can compute.

    Inputs: images (B, 3, H, W) uint8 RGB, resized and in the upper left corner of a canvas of fixed size; and sizes
    (B, 2) int32, the height and width of each resized image. Pixels outside of the size do not matter.

    Outputs without `top`: the raw outputs of all anchors, in the order of ``anchors`` (N, 4), which is an output, too:
    ``logits`` (B, N, K) of the classes, or of an object of any class (K = 1) in a two-stage detector; ``deltas``
    (B, N, 4); in an FCOS ``centerness`` (B, N, 1).

    Outputs with `top`: the `top` best candidates of an image, without NMS: boxes (B, top, 4) in pixels of the resized
    image, scores (B, top), and labels (B, top) from 1.

    Args:
        detector: in evaluation mode, on the CPU.
        canvas: size of the images.
        top: number of candidates; None: raw outputs.
    """

    one_image = False
    """Whether a file of this graph takes one image per call only."""

    def __init__(self, detector: Detector, canvas: Canvas, top: int | None = None) -> None:
        super().__init__()
        if any(side % detector.resize.pad_to for side in canvas):
            raise DistillError(
                f"--canvas {canvas.height}x{canvas.width}: expected multiples of {detector.resize.pad_to} pixels "
                "(data.pad_to)"
            )
        rule = detector.options.get("detection_rule", "torchvision")
        if top is not None and "centerness" in detector.spec.outputs and rule.startswith("mmdetection"):
            raise DistillError(
                f"--top {top}: the scores of detection_rule={rule} need a threshold on the class alone, which the best "
                "candidates do not have; leave out --top, and decode the raw outputs"
            )
        self.detector, self.canvas, self.top = detector, canvas, top
        self.view_class = traced_view(detector, 1)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        if self.top is not None:
            return ["boxes", "scores", "labels"]
        extra = ["centerness"] if "centerness" in self.detector.spec.outputs else []
        return ["logits", "deltas", *extra, "anchors"]

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of a batch of images."""
        view = self.view_class(self.detector, _batch(images, self.canvas, self.canvas), False, True, None)
        view.sides = sizes
        raw = self.raw_outputs(view)
        return tuple(raw.values()) if self.top is None else decode(self.detector, raw, sizes, self.top)

    def raw_outputs(self, view: Any) -> dict[str, Tensor]:
        """The raw outputs by name."""
        spec, logits = view.spec, "class_logits" if "class_logits" in view.spec.outputs else "objectness"
        maps = {name: getattr(view, name) for name in (logits, "deltas", "centerness") if name in spec.outputs}
        flat = {
            name: torch.cat([_flatten(x, spec.anchors[stride]) for stride, x in levels.items()], dim=1)
            for name, levels in maps.items()
        }
        return {"logits": flat.pop(logits), **flat, "anchors": torch.cat(list(view.anchors.values()))}


def dense_graph(detector: Detector, canvas: Canvas, top: int | None = None) -> DenseGraph | DenseQueryGraph:
    """The dense graph of a detector's family.

    Raises:
        DistillError: the canvas or `top` does not fit the detector.
    """
    if has_queries(detector):
        return DenseQueryGraph(detector, canvas, top, traced_view(detector, 1))
    return DenseGraph(detector, canvas, top)


def _flatten(x: Tensor, anchors: int) -> Tensor:
    """Reshape (B, A*C, H, W) to (B, H*W*A, C)."""
    height, width = x.shape[-2:]
    columns = x.shape[1] // anchors
    split = x.view(x.shape[0], anchors, columns, height, width).permute(0, 3, 4, 1, 2)
    return split.reshape(x.shape[0], height * width * anchors, columns)


def decode(detector: Detector, raw: Mapping[str, Tensor], sizes: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates of each image, without NMS, from the raw outputs of a `DenseGraph`.

    Returns:
        Boxes (B, top, 4) in pixels of the resized image, clipped to it; scores (B, top); labels (B, top) from 1.
    """
    logits, deltas, anchors = raw["logits"], raw["deltas"], raw["anchors"]
    scores = logits.sigmoid()
    if "centerness" in raw:
        scores = (scores * raw["centerness"].sigmoid()).sqrt()
    classes, batch = logits.shape[2], deltas.shape[0]
    best, place = scores.flatten(1).topk(min(top, int(scores.shape[1]) * int(classes)))
    anchor = torch.div(place, classes, rounding_mode="floor")
    picked = deltas.gather(1, anchor[..., None].expand(-1, -1, 4)).reshape(-1, 4)
    image = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    view = traced_view(detector, 1)(detector, _batch(image, (1, 1), (1, 1)), False, True, None)
    boxes = view._decode(picked, anchors[anchor.flatten()]).view(batch, -1, 4)
    limits = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits), best, place - anchor * classes + 1


def _batch(images: Tensor, size: Any, original: Any) -> Batch:
    """A batch whose images all have the same (height, width), which may be tensors."""
    return Batch(images, (tuple(size),), (tuple(original),), (NO_TARGET,), (0,))


def has_queries(detector: Detector) -> bool:
    """Whether a detector is a set-prediction detector."""
    return "queries" in detector.spec.outputs


def traced_view(detector: Detector, pad_to: int) -> Any:
    """The View class of a detector for tracing.

    Raises:
        DistillError: the detector is of a family without a feature pyramid, which has no traced View.
    """
    kind, outputs = detector.view_class, detector.spec.outputs
    if "neck" not in outputs or not outputs & {"rois", "class_logits"}:
        raise DistillError(
            f"export: the detector is a {detector.spec.family}. Expected a family with a feature pyramid whose View "
            "has rois or class_logits; its View's outputs are " + ", ".join(sorted(outputs))
        )
    mixin: type = TracedMaskView if "mask_logits" in outputs else TracedView
    if has_queries(detector):
        mixin = TracedSetView
    return type(f"Traced{kind.__name__}", (mixin, kind), {"pad_to": pad_to})
