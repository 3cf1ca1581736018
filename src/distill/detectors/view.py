"""The lazy View: each stage is computed on first use and kept, by explicit calls of torchvision's own parts.

Two kinds of stage: `network` ones run layers, under the autocast mode that the View was opened in; `geometry` ones
handle boxes and losses, in float32 under any autocast, which in bfloat16 would move anchors and boxes by pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes

from distill.precision import upcast
from distill.types import ALTERNATIVES, AnchorTargets, Batch, Detections, DetectorSpec, DistillError, Pyramid, require


class ViewedDetector(Protocol):
    """What a View reads of its detector."""

    net: Any
    pool: Any
    """RoIAlign over the neck, where the network itself has none."""
    spec: DetectorSpec
    options: dict[str, Any]

    def pixels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std, each (3, 1, 1) float32 on `device`."""


T = TypeVar("T")
V = TypeVar("V", bound="LazyView")

BODY = 2**62
"""The number of the body's draw, far from those of the regions."""


def network(compute: Callable[[V], T]) -> functools.cached_property[T]:
    """A stage that runs layers of the network."""
    return _stage(compute, autocast=True)


def geometry(compute: Callable[[V], T]) -> functools.cached_property[T]:
    """A stage that handles boxes or losses."""
    return _stage(compute, autocast=False)


def _stage(compute: Callable[[V], T], autocast: bool) -> functools.cached_property[T]:
    @functools.wraps(compute)
    def run(view: V) -> T:
        if compute.__name__ in view.prefetched:
            return cast(T, view.prefetched.pop(compute.__name__))
        with view.scope(autocast):
            return compute(view)

    return functools.cached_property(run)


class LazyView:
    """The part of `distill.types.View` that all families share: images, body and detections.

    A family's View names in `outputs` the members that it adds. Reading a member that only other families have raises
    `MissingOutputError`.
    """

    outputs: ClassVar[frozenset[str]] = frozenset({"body"})
    """What `DetectorSpec.outputs` of the family is."""

    def __init__(self, detector: ViewedDetector, batch: Batch, training: bool, frozen: bool, seed: int | None) -> None:
        if batch.images.dtype != torch.uint8:
            raise DistillError(f"batch.images: expected uint8 RGB, not normalised, got {batch.images.dtype}")
        self.detector, self.net, self.spec, self.batch = detector, detector.net, detector.spec, batch
        self.training, self.seed, self.device = training, seed, batch.images.device
        self._grad = torch.is_grad_enabled() and not frozen
        self._autocast = torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type)
        self.prefetched: dict[str, Any] = {}
        """Stages that were computed ahead and that nobody has read."""
        self._kept: dict[tuple[str, tuple[int, ...]], tuple[Sequence[Tensor], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        """Called for a name that the View does not have, and after a property raised an `AttributeError`."""
        if name in ALTERNATIVES and name not in self.outputs:
            require(self.spec, name, f"view.{name}")
        return object.__getattribute__(self, name)  # raises the property's own error again

    @contextmanager
    def scope(self, autocast: bool) -> Iterator[None]:
        """The grad mode that the View was opened in, with its autocast mode or with none."""
        enabled, dtype = self._autocast
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(torch.autocast(self.device.type, dtype=dtype, enabled=enabled and autocast))
            yield

    @contextmanager
    def draw(self, number: int) -> Iterator[None]:
        """The random stream of one draw: the global one, or one of this View's own that leaves the global one alone."""
        if self.seed is None:
            yield
            return
        generator = _generator(self.device)
        state = generator.get_state()
        generator.manual_seed((2 * self.seed + number) % 2**63)
        try:
            yield
        finally:
            generator.set_state(state)

    @property
    def stages(self) -> list[str]:
        """Names of the stages that were read, by others or by one another, in an order in which they may be read."""
        kinds = reversed(type(self).__mro__)
        named = {name: each for kind in kinds for name, each in vars(kind).items()}
        return [
            name for name, each in named.items() if name in vars(self) and isinstance(each, functools.cached_property)
        ]

    def prefetch(self, stages: Sequence[str]) -> None:
        """Compute `stages` now, those that this View has. Reading an intermediate stage recomputes it."""
        self.prefetched = {stage: getattr(self, stage) for stage in stages if hasattr(type(self), stage)}
        for stage in self.stages:
            del vars(self)[stage]

    @geometry
    def images(self) -> Tensor:
        """(B, 3, H, W), normalised for this detector, then zero in the padding, in the dtype of its weights."""
        mean, std = self.detector.pixels(self.device)
        pixels = (
            self.batch.images.flip(1)
            if self.detector.options["pixels"]["channel_order"] == "bgr"
            else self.batch.images
        )
        # Batches lie with their channels last; the layout that nets are given is theirs to choose.
        images = (pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255 - mean) / std
        height, width = images.shape[-2:]
        if any(size != (height, width) for size in self.batch.sizes):
            sizes = torch.tensor(self.batch.sizes).to(self.device, non_blocking=True)
            rows = torch.arange(height, device=self.device) >= sizes[:, :1]
            columns = torch.arange(width, device=self.device) >= sizes[:, 1:]
            images.masked_fill_(rows[:, None, :, None] | columns[:, None, None, :], 0.0)
        return images.to(next(self.net.parameters()).dtype)

    @network
    def body(self) -> Pyramid:
        """C2..C5 by stride, whichever of them the neck is built on."""
        images = self.images
        with self.draw(BODY):  # a body that is trained may drop paths by chance
            return dict(zip(self.spec.body, self.net.backbone.body.maps(images), strict=True))

    @functools.cached_property
    def targets(self) -> list[dict[str, Tensor]]:
        """Ground truth as torchvision wants it."""
        return [{"boxes": target.boxes, "labels": target.labels} for target in self.batch.targets]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image without its padding."""
        return list(self.batch.sizes)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The detector's own supervised losses, by torchvision's names."""
        raise NotImplementedError

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Detections in resized pixels; the thresholds default to the detector's own."""
        raise NotImplementedError

    @geometry
    def detections(self) -> list[Detections]:
        """The detector's own predictions, in the original images' pixels."""
        return self.enlarged(self.predictions())

    def enlarged(self, found: Sequence[Detections]) -> list[Detections]:
        """Detections in resized pixels, given in the original images' pixels."""
        sizes = zip(self.batch.sizes, self.batch.original_sizes, strict=True)
        return [
            Detections(resize_boxes(one.boxes, size, original), one.scores, one.labels)
            for one, (size, original) in zip(found, sizes, strict=True)
        ]


class PyramidView(LazyView):
    """The part of `distill.types.View` that detectors with a feature pyramid and a dense head share."""

    outputs = LazyView.outputs | {"neck", "anchors", "deltas", "anchor_targets", "anchor_boxes", "roi_features"}

    @network
    def neck(self) -> Pyramid:
        """The feature pyramid by nominal stride."""
        fpn = self.net.backbone.fpn
        stages = list(self.body.values())[-len(fpn.inner_blocks) :]
        maps = fpn({str(index): x for index, x in enumerate(stages)})
        return dict(zip(self.spec.neck, maps.values(), strict=True))

    @geometry
    def anchors(self) -> dict[int, Tensor]:
        """Stride -> (H*W*A, 4) float32, rows in the order (row, column, anchor), shared by all images."""
        # Every stage halves with ceil, so the grids follow from the image alone: anchors cost no forward pass.
        height, width = self.batch.images.shape[-2:]
        grids = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.spec.neck]
        generator = self.generator
        if generator.cell_anchors[0].dtype != torch.float32:  # torchvision's own forward rounds them under autocast
            generator.cell_anchors = list(map(generator.generate_anchors, generator.sizes, generator.aspect_ratios))
        # torchvision makes anchors in the dtype of the maps it is shown, so it is shown float32 ones.
        maps = [torch.empty((), device=self.device).expand(1, 1, *grid) for grid in grids]
        (flat,) = generator(ImageList(self.batch.images, [(height, width)]), maps)
        counts = [h * w * a for (h, w), a in zip(grids, self.spec.anchors.values(), strict=True)]
        return dict(zip(self.spec.neck, flat.split(counts), strict=True))

    @property
    def generator(self) -> Any:
        """torchvision's AnchorGenerator of this family."""
        raise NotImplementedError

    @property
    def pool(self) -> Any:
        """RoIAlign over this family's neck, made by `roi_align.region_pool`."""
        raise NotImplementedError

    def roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        """(R, C, 7, 7) for one (r, 4) tensor of boxes per image, in order."""
        return self.keep("roi_features", boxes, self._roi_features)

    def _roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        return self.pooled(self.pool, boxes)

    def pooled(self, pool: Any, boxes: Sequence[Tensor]) -> Tensor:
        """RoIAlign of the neck's maps, in float32, then in the maps' own dtype."""
        neck = self.neck
        with self.scope(autocast=False):
            maps = {str(level): upcast(x) for level, x in enumerate(neck.values())}
            return cast(Tensor, pool(maps, list(boxes), self.sizes)).to(next(iter(neck.values())).dtype)

    def keep(self, name: str, boxes: Sequence[Tensor], compute: Callable[[Sequence[Tensor]], T]) -> T:
        """Compute once per box list, known by its tensors; they are kept too, or an id could come to mean another."""
        if len(boxes) != len(self.batch):
            raise DistillError(f"{name}: expected one box tensor per image ({len(self.batch)}), got {len(boxes)}")
        key = name, tuple(map(id, boxes))
        if key not in self._kept:
            self._kept[key] = tuple(boxes), compute(boxes)
        return cast(T, self._kept[key][1])

    @property
    def deltas(self) -> Pyramid:
        """Stride -> box deltas (B, A*4, H, W)."""
        raise NotImplementedError

    @property
    def anchor_targets(self) -> AnchorTargets:
        """What ground truth asks of each anchor, and the sample that the detector's own loss sees."""
        raise NotImplementedError

    def anchor_boxes(self, deltas: Tensor) -> Tensor:
        """(B, N, 4): all anchors as deltas (B, N, 4) move them, not clipped."""
        with self.scope(autocast=False):
            anchors = torch.cat(list(self.anchors.values()))
            return torch.stack([self._decode(each, anchors) for each in upcast(deltas)])

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (N, 4) that deltas lead to from anchors."""
        raise NotImplementedError


def _generator(device: torch.device) -> torch.Generator:
    """The global random generator that torch draws from on this device."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return cast(torch.Generator, module.default_generators[index])


@contextmanager
def temporarily(module: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a torchvision part just around a call; those given as None stay as they are."""
    before = {name: getattr(module, name) for name, value in attributes.items() if value is not None}
    for name in before:
        setattr(module, name, attributes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
