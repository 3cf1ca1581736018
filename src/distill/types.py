"""The vocabulary: data that passes between data sources, detectors, losses and the Distiller.

Axis letters, used in every docstring: B images, C channels, H W map height and width, L levels, A anchors per cell,
K classes (background not counted), R regions. Boxes are ``xyxy`` in pixels of the *resized* image unless a name says
otherwise. Labels are torchvision's: 0 is background, class ``i`` of ``classes`` has label ``i + 1``. Student first,
teacher second, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:  # torch takes seconds to import, and a mistyped command line should not wait for it
    import torch
    from torch import Tensor

Pyramid: TypeAlias = "dict[int, Tensor]"
"""Maps (B, C, H, W) keyed by nominal stride in pixels, finest first."""

Size = tuple[int, int]
"""(height, width) in pixels."""


class DistillError(Exception):
    """Something a user can mend: says what was expected, what came, where, and what to do next."""


@dataclass(frozen=True)
class Target:
    """Ground truth of one image: boxes (N, 4) float32 and labels (N,) int64 from 1 to K. Crowds are left out."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    """(N, h, w) uint8 of 0 and 1, of the resized image **without** its padding; None where none were asked for."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        parts = (self.boxes, self.labels, self.masks)
        return Target(*(None if part is None else part.to(device, non_blocking=non_blocking) for part in parts))  # type: ignore[arg-type]

    def pin_memory(self) -> Target:
        masks = None if self.masks is None else self.masks.pin_memory()
        return Target(self.boxes.pin_memory(), self.labels.pin_memory(), masks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with boxes and labels as arrays, so that a worker sends them as bytes.

        Torch sends each tensor as a shared file of its own, which takes longer than a small picture takes to decode.
        """
        if self.boxes.device.type != "cpu":
            return Target, (self.boxes, self.labels, self.masks)
        return _unpickled, (self.boxes.detach().numpy(), self.labels.numpy(), self.masks)


def _unpickled(boxes: Any, labels: Any, masks: Tensor | None) -> Target:
    import torch

    return Target(torch.from_numpy(boxes), torch.from_numpy(labels), masks)


@dataclass(frozen=True)
class Batch:
    """Images made once, on the workers, and seen by both models: resized and padded, but **not** normalised.

    A dataclass with ``to`` and ``pin_memory``, because torch would turn the tuples inside a NamedTuple into lists.
    """

    images: Tensor
    """(B, 3, H, W) uint8 RGB, zero-padded to the right and below; from our loaders channels last in memory, as decoded."""
    sizes: tuple[Size, ...]
    """Size of each resized image, without its padding."""
    original_sizes: tuple[Size, ...]
    """Size of each image as stored on disk."""
    targets: tuple[Target, ...]
    ids: tuple[int, ...]
    """Image ids of the data set (64-bit)."""

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """Move the tensors; asynchronously where the memory is pinned."""
        fast = self.images.is_pinned() if non_blocking is None else non_blocking
        moved = tuple(target.to(device, fast) for target in self.targets)
        return Batch(self.images.to(device, non_blocking=fast), self.sizes, self.original_sizes, moved, self.ids)

    def pin_memory(self) -> Batch:
        pinned = tuple(target.pin_memory() for target in self.targets)
        return Batch(self.images.pin_memory(), self.sizes, self.original_sizes, pinned, self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class Detections(NamedTuple):
    """What a detector found in one image: boxes (N, 4), scores (N,) in [0, 1], labels (N,) from 1 to K, best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    """(N, H, W) bool in the same image, from a detector of masks: probability above one half."""


class Regions(NamedTuple):
    """Sampled regions of a two-stage detector, one tensor per image, with what the box head should say of them."""

    boxes: list[Tensor]
    """(R, 4)."""
    labels: list[Tensor]
    """(R,), 0 = background."""
    truth: list[Tensor]
    """(R, 4): the matched ground truth; of a negative region the box that it overlaps most, or zeros in an image without."""
    deltas: list[Tensor]
    """(R, 4): regression targets, in the coding of ``roi_logits``."""


class AnchorTargets(NamedTuple):
    """What the dense head should say, for all anchors N of all levels, in the order of ``anchors``."""

    labels: Tensor
    """(B, N) int64: the class (one-stage) or 1 (RPN), 0 = background, -1 = neither."""
    deltas: Tensor
    """(B, N, 4): regression targets in the coding of ``deltas``; they mean something where the label is above 0."""
    sampled: Tensor
    """(B, N) bool: the anchors that the detector's own classification loss sees."""


@dataclass(frozen=True)
class DetectorSpec:
    """What a detector is, known before any forward pass: enough to build adapters and to refuse a bad match."""

    family: str
    """``faster_rcnn``, ``mask_rcnn``, ``retinanet`` or ``fcos``."""
    outputs: frozenset[str]
    """Names of the View's members that this family has, of those that not every family has: see `MAPS`, `ALTERNATIVES`."""
    classes: tuple[str, ...]
    body: dict[int, int]
    """Stride -> channels of the backbone's stages (C2..C5)."""
    neck: dict[int, int]
    """Stride -> channels of the feature pyramid; empty without one."""
    anchors: dict[int, int]
    """Stride -> anchors per cell (A); empty without anchors."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: str
    """Normalisation of the backbone: ``frozen``, ``batch_fixed_stats``, ``batch`` or ``sync``."""


MAPS = ("body", "neck", "objectness", "class_logits", "deltas", "centerness")
"""Outputs that are maps by stride, in the order in which a detector computes them."""

_PYRAMID = "choose a detector with a feature pyramid (model=frcnn_r50, model=retinanet_r50)"
_TWO_STAGE = "choose a two-stage detector (model=frcnn_r50)"
_ANCHOR_FREE = "choose an anchor-free detector (model=fcos_r50)"
ALTERNATIVES = {
    **dict.fromkeys(("neck", "anchors", "deltas", "anchor_targets", "anchor_boxes", "roi_features"), _PYRAMID),
    **dict.fromkeys(("objectness", "proposals", "rois", "roi_logits", "roi_boxes"), _TWO_STAGE),
    **dict.fromkeys(("points", "centerness"), _ANCHOR_FREE),
    "class_logits": "choose a one-stage detector (model=retinanet_r50)",
    "mask_logits": "choose a detector with a mask head (model=mask_rcnn_r50)",
}
"""Output of some families -> which detector has it."""


class MissingOutputError(DistillError, AttributeError):
    """A detector does not have an output that is read of it. An `AttributeError` too, so that `hasattr` works on Views."""


def require(spec: DetectorSpec, output: str, reader: str, role: str = "detector", remedy: str = "") -> None:
    """Refuse a detector without an output.

    Args:
        spec: of the detector.
        output: a name of `DetectorSpec.outputs`.
        reader: the loss term, option or stage that needs the output, for the message.
        role: ``student``, ``teacher`` or ``detector``.
        remedy: what else helps besides another detector.

    Raises:
        MissingOutputError: the detector does not have the output.
    """
    if output not in spec.outputs:
        alternative = ALTERNATIVES.get(output, f"choose a detector with {output}")
        advice = f"{remedy}, or {alternative}" if remedy else alternative[0].upper() + alternative[1:]
        raise MissingOutputError(f"{reader}: the {role} is a {spec.family}, which has no {output}. {advice}")


class View(Protocol):
    """One detector looking at one batch. Each stage is computed on first use and kept; the reading order changes nothing.

    A frozen (teacher's) View enters ``no_grad`` around each stage. Per-level entries are keyed by stride.
    """

    batch: Batch
    spec: DetectorSpec

    @property
    def stages(self) -> Sequence[str]:
        """Names of the stages that were read, by others or by one another, in an order in which they may be read."""

    @property
    def body(self) -> Pyramid: ...

    @property
    def neck(self) -> Pyramid: ...

    @property
    def anchors(self) -> dict[int, Tensor]:
        """Stride -> (H*W*A, 4) float32, shared by all images of the batch. Anchor-free: a square per cell, a stride wide."""

    @property
    def points(self) -> dict[int, Tensor]:
        """Anchor-free: stride -> (H*W, 2) float32, x and y of the centers of `anchors`."""

    @property
    def class_logits(self) -> Pyramid:
        """Dense class logits (B, A*K, H, W), one-stage only."""

    @property
    def objectness(self) -> Pyramid:
        """RPN logits (B, A, H, W), two-stage only."""

    @property
    def deltas(self) -> Pyramid:
        """Dense box deltas (B, A*4, H, W); anchor-free: distances to left, top, right and bottom in strides, from 0 on."""

    @property
    def centerness(self) -> Pyramid:
        """Logits (B, 1, H, W) of how central a cell lies in its object, one-stage anchor-free only."""

    @property
    def anchor_targets(self) -> AnchorTargets:
        """What ground truth asks of each anchor, and the sample of them that the detector's own loss sees."""

    def anchor_boxes(self, deltas: Tensor) -> Tensor:
        """(B, N, 4) float32: all anchors as (B, N, 4) deltas, in the order and coding of `anchor_targets`, move them."""

    @property
    def proposals(self) -> list[Tensor]:
        """Two-stage: (P, 4) float32 per image, detached."""

    @property
    def rois(self) -> Regions:
        """Two-stage: the regions sampled for the box head, ground truth added. Drawn once."""

    def roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        """(R, C, 7, 7) for the regions of all images in order; kept per box list."""

    def roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Two-stage: (R, K+1) class logits and (R, (K+1)*4) box deltas; kept per box list."""

    def roi_boxes(self, boxes: Sequence[Tensor]) -> Tensor:
        """Two-stage: (R, K+1, 4) float32, the regions as the box head moves them for each class, not clipped."""

    def mask_logits(self, boxes: Sequence[Tensor]) -> Tensor:
        """Mask R-CNN: (R, K+1, 28, 28) for the regions of all images in order; kept per box list."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """The detector's own supervised losses, scalars by torchvision's names."""

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Detections in resized pixels; the thresholds default to the detector's own."""

    @property
    def detections(self) -> list[Detections]:
        """After NMS, in the original image's pixels; with masks from a detector of masks."""
