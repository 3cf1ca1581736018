"""Shared types: the data that passes between data sources, detectors, losses and the Distiller.

All docstrings use these axis letters: B images, C channels, H and W map height and width, L levels, A anchors per
cell, K classes (background not counted), R regions. Boxes are ``xyxy`` in pixels of the *resized* image unless a name
says otherwise. Labels follow torchvision: 0 is background, and class ``i`` of ``classes`` has label ``i + 1``.
Arguments and results always give the student first and the teacher second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:  # torch takes seconds to import; a mistyped command line should fail at once
    import torch
    from torch import Tensor

Pyramid: TypeAlias = "dict[int, Tensor]"
"""Nominal stride in pixels -> map (B, C, H, W). The finest level comes first."""

Size = tuple[int, int]
"""(height, width) in pixels."""


class DistillError(Exception):
    """An error that the user can fix. The message says what was expected, what came, where, and the next step."""


@dataclass(frozen=True)
class Target:
    """Ground truth of one image: boxes (N, 4) float32 and labels (N,) int64 from 1 to K. Crowd boxes are left out."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    """(N, h, w) uint8, 0 or 1, of the resized image **without** its padding. None unless masks were requested."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        parts = (self.boxes, self.labels, self.masks)
        return Target(*(None if part is None else part.to(device, non_blocking=non_blocking) for part in parts))  # type: ignore[arg-type]

    def pin_memory(self) -> Target:
        masks = None if self.masks is None else self.masks.pin_memory()
        return Target(self.boxes.pin_memory(), self.labels.pin_memory(), masks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle boxes and labels as NumPy arrays, so that a worker process sends them as bytes.

        Torch sends each tensor through its own shared file. Opening that file takes longer than decoding a small image.
        """
        if self.boxes.device.type != "cpu":
            return Target, (self.boxes, self.labels, self.masks)
        return _unpickled, (self.boxes.detach().numpy(), self.labels.numpy(), self.masks)


def _unpickled(boxes: Any, labels: Any, masks: Tensor | None) -> Target:
    import torch

    return Target(torch.from_numpy(boxes), torch.from_numpy(labels), masks)


class MissingTargets(tuple[Target, ...]):
    """The targets of images whose boxes are not known. Reading one raises an error: an empty target would say that the
    image has no objects."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Target]:
        raise _missing_targets()

    def __getitem__(self, index: Any) -> Any:
        raise _missing_targets()

    def __len__(self) -> int:
        raise _missing_targets()

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return MissingTargets, ()


def _missing_targets() -> DistillError:
    return DistillError(
        "a loss reads the ground truth of images of data.unlabeled, whose boxes are not known. Give these images the "
        "teacher's boxes with data.unlabeled.boxes=teacher, or choose terms without ground truth"
    )


@dataclass(frozen=True)
class Batch:
    """A batch of images, resized and padded but **not** normalized. Workers create a batch once, for both models.

    `Batch` is a dataclass with ``to`` and ``pin_memory``: torch would turn the tuples in a NamedTuple into lists.
    """

    images: Tensor
    """(B, 3, H, W) uint8 RGB, zero-padded on the right and at the bottom.

    The memory format of our loaders is channels last, as decoders write it.
    """
    sizes: tuple[Size, ...]
    """(height, width) of each resized image, without its padding."""
    original_sizes: tuple[Size, ...]
    """(height, width) of each image as stored on disk."""
    targets: tuple[Target, ...]
    """One target per image, or `MissingTargets`."""
    ids: tuple[int, ...]
    """Image ids of the data set, 64-bit integers."""
    unlabeled: Batch | None = field(default=None, kw_only=True)
    """Images of ``data.unlabeled`` for the same training step. Only distillation losses see them. Their targets are
    those of the teacher's boxes, or `MissingTargets`."""

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """Move the tensors. With `non_blocking=None` the copy is asynchronous if the images are in pinned memory."""
        fast = self.images.is_pinned() if non_blocking is None else non_blocking
        return self._moved(
            self.images.to(device, non_blocking=fast),
            lambda target: target.to(device, fast),
            lambda batch: batch.to(device, non_blocking),
        )

    def pin_memory(self) -> Batch:
        return self._moved(self.images.pin_memory(), Target.pin_memory, Batch.pin_memory)

    def _moved(self, images: Tensor, move: Callable[[Target], Target], move_batch: Callable[[Batch], Batch]) -> Batch:
        """An ordinary `Batch` of moved tensors."""
        targets = self.targets if self.targets_missing else tuple(move(target) for target in self.targets)
        unlabeled = None if self.unlabeled is None else move_batch(self.unlabeled)
        return Batch(images, self.sizes, self.original_sizes, targets, self.ids, unlabeled=unlabeled)

    @property
    def targets_missing(self) -> bool:
        """Whether the boxes of the images are not known."""
        return isinstance(self.targets, MissingTargets)

    def __len__(self) -> int:
        return len(self.ids)


class Detections(NamedTuple):
    """Detections of one image, best first: boxes (N, 4), scores (N,) in [0, 1], labels (N,) from 1 to K."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    """(N, H, W) bool of the same image, true where the mask probability is above 0.5. None without a mask head."""


class Regions(NamedTuple):
    """Sampled regions of a two-stage detector and the targets of the box head. Each field has one tensor per image."""

    boxes: list[Tensor]
    """(R, 4) region boxes."""
    labels: list[Tensor]
    """(R,) labels, 0 = background."""
    truth: list[Tensor]
    """(R, 4) ground-truth boxes.

    A positive region has its matched box. The row of a negative region has no meaning (torchvision fills in the image's
    first box). In an image without boxes all rows are zeros.
    """
    deltas: list[Tensor]
    """(R, 4) regression targets, encoded like the deltas of `View.roi_logits`."""


class AnchorTargets(NamedTuple):
    """Targets of the dense head for the N anchors of all levels, in the order of `View.anchors`."""

    labels: Tensor
    """(B, N) int64: the class label (one-stage) or 1 (RPN); 0 = background, -1 = ignored."""
    deltas: Tensor
    """(B, N, 4): regression targets, encoded like `View.deltas`. Only rows with a label above 0 are valid."""
    sampled: Tensor
    """(B, N) bool: anchors that the detector's own classification loss uses."""


class QueryLayer(NamedTuple):
    """Outputs of one decoder layer of a set-prediction detector, for the Q queries of each image."""

    logits: Tensor
    """(B, Q, K) class logits, one sigmoid per class."""
    boxes: Tensor
    """(B, Q, 4) float32 (center x, center y, width, height), as shares of the padded image's width and height."""
    hidden: Tensor
    """(B, Q, D) hidden states."""
    corners: Tensor | None = None
    """(B, Q, 4, bins) logits of the distribution of each side's offset. None without distributions (RT-DETR)."""


class QueryPoints(NamedTuple):
    """The cells of the encoder's maps from which a set-prediction detector starts its Q queries."""

    cells: Tensor
    """(B, Q) int64: indices into the cells of all levels, finest level first, row by row."""
    boxes: Tensor
    """(B, Q, 4) float32: the start boxes, in the form of `QueryLayer.boxes`, detached."""


@dataclass(frozen=True)
class DetectorSpec:
    """Facts about a detector that are known before any forward pass.

    Losses build their adapters from the spec, and reject a student and teacher that do not fit together.
    """

    family: str
    """``faster_rcnn``, ``mask_rcnn``, ``retinanet``, ``fcos``, or the name of another family."""
    outputs: frozenset[str]
    """Names of the View outputs that this family has, see `MAPS` and `ALTERNATIVES`.

    Outputs that every family has are not listed, except ``body``.
    """
    classes: tuple[str, ...]
    """Class names in label order, without background."""
    body: dict[int, int]
    """Stride -> channels of the backbone stages C2 to C5."""
    neck: dict[int, int]
    """Stride -> channels of the feature pyramid levels. Empty if the detector has no feature pyramid."""
    anchors: dict[int, int]
    """Stride -> anchors per cell (A). Empty if the detector has no anchors."""
    mean: tuple[float, ...]
    """Channel means that normalize images in [0, 1], in the channel order of the detector."""
    std: tuple[float, ...]
    """Channel standard deviations that normalize images in [0, 1], in the channel order of the detector."""
    norm: str
    """Kind of the backbone's normalization layers, ``frozen``, ``batch_fixed_stats``, ``batch`` or ``sync``."""
    anchor_options: Mapping[str, Any] = field(default_factory=dict)
    """Options that decide which boxes deltas stand for at every image size (``anchors.sizes``, ``point_offset``, ...).
    In detectors of one family with equal `anchors` and `anchor_options`, equal deltas are equal boxes."""
    query_channels: int | None = None
    """Channels of `QueryLayer.hidden`. None: no queries, or the detector does not state the number."""
    corner_bins: Mapping[str, float] = field(default_factory=dict)
    """The bins of the corner distributions in `QueryLayer.corners`: arguments of `set_criterion.CornerBins` (``count``,
    ``limit``, ``scale``). Empty without distributions."""
    trains_corners: bool = True
    """Whether the detector's own losses train the form of these distributions. Otherwise they train the mean alone."""
    side_bins: int | None = None
    """Distances in the distribution of each side (`side_logits`). None without distributions."""
    bridge: Mapping[str, str] | None = None
    """Of a teacher with another class list: its class name -> the data's class name, see `labels.bridge_classes`.

    None: classes match by exact name, and every class of the student must be known."""

    @property
    def data_classes(self) -> tuple[str, ...]:
        """The class names in label order, those of `bridge` under the data's names.

        A class outside of a bridge gets a name that no class of the data has, although the data may have its own name.
        """
        if self.bridge is None:
            return self.classes
        return tuple(self.bridge.get(name, f"{name} (unmapped)") for name in self.classes)


MAPS = ("body", "neck", "objectness", "class_logits", "side_logits", "deltas", "centerness")
"""Outputs with one map per stride, in the order in which a detector computes them."""

_PYRAMID = "choose a detector with a feature pyramid (model=frcnn_r50, model=retinanet_r50)"
_ANCHORS = "choose a detector with anchors (model=frcnn_r50, model=retinanet_r50)"
_TWO_STAGE = "choose a two-stage detector (model=frcnn_r50)"
_ANCHOR_FREE = "choose an anchor-free detector (model=fcos_r50)"
_QUERIES = "choose a detector with queries (model=rtdetr_r18)"
_POINTS = "choose a detector whose queries start from any points (model=rtdetr_r18)"
ALTERNATIVES = {
    **dict.fromkeys(("neck", "roi_features"), _PYRAMID),
    **dict.fromkeys(("anchors", "deltas", "anchor_targets", "anchor_boxes"), _ANCHORS),
    **dict.fromkeys(("objectness", "proposals", "rois", "roi_logits", "roi_boxes"), _TWO_STAGE),
    **dict.fromkeys(("points", "centerness"), _ANCHOR_FREE),
    **dict.fromkeys(("tower_features", "finish_tower"), "choose a one-stage detector (model=retinanet_r50)"),
    **dict.fromkeys(("queries", "query_targets"), _QUERIES),
    **dict.fromkeys(("query_points", "decode"), _POINTS),
    "class_logits": "choose a one-stage detector (model=retinanet_r50)",
    "side_logits": (
        "give a one-stage student and teacher distribution heads (box_head=distribution, and for RetinaNet "
        "box_loss=giou; below model and below teacher.model)"
    ),
    "mask_logits": "choose a detector with a mask head (model=mask_rcnn_r50)",
}
"""Output that only some families have -> advice on a detector that has the output."""


class MissingOutputError(DistillError, AttributeError):
    """The detector does not have a requested output. This is also an `AttributeError`: `hasattr` works on Views."""


def require(spec: DetectorSpec, output: str, reader: str, role: str = "detector", remedy: str = "") -> None:
    """Raise an error if a detector does not have an output.

    Args:
        spec: the spec of the detector.
        output: an output name, as in `DetectorSpec.outputs`.
        reader: the loss term, option or stage that needs the output. The message names the reader.
        role: the role of the detector in the message: ``student``, ``teacher`` or ``detector``.
        remedy: a remedy that the message suggests before the advice to choose another detector.

    Raises:
        MissingOutputError: the detector does not have the output.
    """
    if output not in spec.outputs:
        alternative = ALTERNATIVES.get(output, f"choose a detector with {output}")
        advice = f"{remedy}, or {alternative}" if remedy else alternative[0].upper() + alternative[1:]
        raise MissingOutputError(f"{reader}: the {role} is a {spec.family}, which has no {output}. {advice}")


class View(Protocol):
    """The outputs of one detector on one batch.

    Each stage is computed on first use and cached. The order of reading does not change any value. A frozen View, which
    the teacher has, computes each stage under ``no_grad``. Outputs per level are dictionaries keyed by stride.
    """

    batch: Batch
    spec: DetectorSpec

    @property
    def stages(self) -> Sequence[str]:
        """Names of the stages that were computed, in a valid order of computation.

        The names include stages that only other stages read.
        """

    @property
    def body(self) -> Pyramid: ...

    @property
    def neck(self) -> Pyramid: ...

    def with_neck(self, maps: Pyramid, targets: Sequence[Target] | None = None) -> View:
        """Return a View of the same detector and images with other maps as its neck, and other targets if given.

        Gradients reach the maps, also where this View is frozen.
        """

    @property
    def anchors(self) -> dict[int, Tensor]:
        """Stride -> anchors (H*W*A, 4) float32. All images of the batch share the anchors.

        An anchor-free detector has one square per cell, with the stride as its side.
        """

    @property
    def points(self) -> dict[int, Tensor]:
        """Anchor-free detectors: stride -> (H*W, 2) float32, the centers (x, y) of `anchors`."""

    @property
    def class_logits(self) -> Pyramid:
        """One-stage detectors: dense class logits (B, A*K, H, W)."""

    @property
    def objectness(self) -> Pyramid:
        """Two-stage detectors: RPN logits (B, A, H, W)."""

    @property
    def deltas(self) -> Pyramid:
        """Dense box deltas (B, A*4, H, W).

        Deltas of an anchor-free detector are distances to the left, top, right and bottom side, in strides, at least 0.
        """

    @property
    def side_logits(self) -> Pyramid:
        """Detectors with ``box_head=distribution``: logits (B, A*4*bins, H, W) of the distances of each side.

        Channel (4 a + side) * bins + k belongs to anchor a and the distance of k units. `deltas` are the expectations.
        """

    def tower_features(self, branch: str, depth: int) -> Pyramid:
        """One-stage detectors: return the output (B, C, H, W) of a convolution of a head's tower, before its ReLU.

        Args:
            branch: ``classes`` or ``boxes``.
            depth: number of convolutions that were run; 0 for the neck.
        """

    def finish_tower(self, branch: str, depth: int, features: Mapping[int, Tensor]) -> Pyramid:
        """One-stage detectors: return class logits or deltas of features (after the ReLU) of convolution `depth`.

        The gradient reaches the features, also where this View is frozen. See `tower_features`.
        """

    @property
    def centerness(self) -> Pyramid:
        """Anchor-free one-stage detectors: logits (B, 1, H, W), high for a cell near the center of its object."""

    @property
    def anchor_targets(self) -> AnchorTargets:
        """Targets of all anchors, and the sample of anchors that the detector's own loss uses."""

    def anchor_boxes(self, deltas: Tensor) -> Tensor:
        """Apply deltas (B, N, 4) to all anchors; return boxes (B, N, 4) float32.

        The deltas have the order and the encoding of `anchor_targets`.
        """

    @property
    def proposals(self) -> list[Tensor]:
        """Two-stage detectors: proposals (P, 4) float32 of each image, detached."""

    @property
    def rois(self) -> Regions:
        """Two-stage detectors: regions for the box head, sampled once from proposals and ground truth."""

    def roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        """Return the pooled features (R, C, 7, 7) of the regions of all images, in order. Cached for each box list."""

    def roi_logits(self, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Two-stage detectors: return class logits (R, K+1) and box deltas (R, (K+1)*4). Cached for each box list."""

    def roi_boxes(self, boxes: Sequence[Tensor]) -> Tensor:
        """Two-stage detectors: return the regions moved by each class's deltas, (R, K+1, 4) float32, not clipped."""

    def mask_logits(self, boxes: Sequence[Tensor]) -> Tensor:
        """Mask R-CNN: return the mask logits (R, K+1, 28, 28) of all images' regions. Cached for each box list."""

    @property
    def queries(self) -> list[QueryLayer]:
        """Set-prediction detectors: outputs of all decoder layers, first layer first, without denoising."""

    @property
    def query_targets(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Set-prediction detectors: for each layer of `queries` and each image, the matched queries and their targets.

        Both are (N,) int64 indices on the CPU: into the layer's Q queries and into the image's ground-truth boxes.
        """

    @property
    def query_points(self) -> QueryPoints:
        """Set-prediction detectors: the cells and boxes from which the decoder starts."""

    def decode(self, points: QueryPoints) -> list[QueryLayer]:
        """Set-prediction detectors: run the decoder from any points. Gradients reach the decoder and the encoder."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """The detector's own supervised losses: name -> scalar."""

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Return the detections of each image, in pixels of the resized image.

        Args:
            score: the lowest score.
            nms: the highest IoU of two detections of one class.
            top: the highest number of detections per image.

        A threshold of None is the detector's own.
        """

    @property
    def detections(self) -> list[Detections]:
        """Detections after NMS, in pixels of the original image. A detector with a mask head adds masks."""
