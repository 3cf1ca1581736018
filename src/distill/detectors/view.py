"""The lazy View. Each stage is computed on first use and cached. Stages call torchvision's own parts.

There are two kinds of stages. A `network` stage runs layers in the autocast mode of the View's creation. A `geometry`
stage computes boxes or losses in float32, without autocast: in bfloat16, anchors and boxes would move by pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import boxes as box_ops

from distill.detectors.detection_rules import finish
from distill.precision import upcast
from distill.types import (
    ALTERNATIVES,
    AnchorTargets,
    Batch,
    Detections,
    DetectorSpec,
    DistillError,
    Pyramid,
    Target,
    require,
)


class ViewedDetector(Protocol):
    """The parts of a detector that a View reads."""

    net: Any
    """torchvision's network."""
    pool: Any
    """RoIAlign over the neck, for networks without a RoIAlign."""
    spec: DetectorSpec
    options: dict[str, Any]
    """Arguments of the detector's constructor."""

    def pixels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each (3, 1, 1) float32 on `device`."""


T = TypeVar("T")
V = TypeVar("V", bound="LazyView")

BODY = 2**62
"""Number of the body's draw for `LazyView.draw`. It is far from the numbers of the sampling draws."""


def network(compute: Callable[[V], T]) -> functools.cached_property[T]:
    """Declare a stage that runs layers of the network."""
    return _stage(compute, autocast=True)


def geometry(compute: Callable[[V], T]) -> functools.cached_property[T]:
    """Declare a stage that computes boxes or losses."""
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

    The View of a family lists the members that it adds in `outputs`. Reading a member that only other families have
    raises a `MissingOutputError`.

    Args:
        detector: the detector.
        batch: uint8 images on the detector's device.
        training: whether the numbers of proposals are those of training or of testing.
        frozen: whether autograd records no stage.
        seed: the seed of all random draws; None draws from the global random state.

    Raises:
        DistillError: the images are not uint8.
    """

    outputs: ClassVar[frozenset[str]] = frozenset({"body"})
    """Value of `DetectorSpec.outputs` for the family."""

    def __init__(self, detector: ViewedDetector, batch: Batch, training: bool, frozen: bool, seed: int | None) -> None:
        if batch.images.dtype != torch.uint8:
            raise DistillError(f"batch.images: expected uint8 RGB, not normalized, got {batch.images.dtype}")
        self.detector, self.net, self.spec, self.batch = detector, detector.net, detector.spec, batch
        self.training, self.seed, self.device = training, seed, batch.images.device
        self._grad = torch.is_grad_enabled() and not frozen
        self._autocast = torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type)
        self.prefetched: dict[str, Any] = {}
        """Prefetched stages that were not read yet."""
        self._kept: dict[tuple[str, tuple[int, ...]], tuple[Sequence[Tensor], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        """Raise the error for a missing member. Python also calls this after a property raised an `AttributeError`."""
        if name in ALTERNATIVES and name not in self.outputs:
            require(self.spec, name, f"view.{name}")
        return object.__getattribute__(self, name)  # raises the property's error again

    @contextmanager
    def scope(self, autocast: bool) -> Iterator[None]:
        """Set the grad mode of the View's creation, and the autocast mode of its creation or none."""
        enabled, dtype = self._autocast
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(torch.autocast(self.device.type, dtype=dtype, enabled=enabled and autocast))
            yield

    @contextmanager
    def draw(self, number: int) -> Iterator[None]:
        """Set the random state for one draw.

        With a seed, the state follows from the seed and `number`, and the global random state is restored afterwards.
        Without a seed, the draw uses the global random state.
        """
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
        """Names of the stages that were computed, in a valid order of computation.

        The names include stages that only other stages read.
        """
        kinds = reversed(type(self).__mro__)
        members = {name: member for kind in kinds for name, member in vars(kind).items()}
        return [
            name
            for name, member in members.items()
            if name in vars(self) and isinstance(member, functools.cached_property)
        ]

    def prefetch(self, stages: Sequence[str]) -> None:
        """Compute the given stages now. Names of stages that this View does not have are ignored.

        Only the given stages are kept. Reading an intermediate stage recomputes it.
        """
        self.prefetched = {stage: getattr(self, stage) for stage in stages if hasattr(type(self), stage)}
        for stage in self.stages:
            del vars(self)[stage]

    @geometry
    def images(self) -> Tensor:
        """Images (B, 3, H, W), normalized for this detector, with zero padding, in the dtype of the weights."""
        mean, std = self.detector.pixels(self.device)
        pixels = (
            self.batch.images.flip(1)
            if self.detector.options["pixels"]["channel_order"] == "bgr"
            else self.batch.images
        )
        # Batches are channels last. Images are contiguous, so that the network's weights decide the memory format.
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
        """Stride -> map, for all of C2 to C5, also for stages that the neck does not use."""
        images = self.images
        with self.draw(BODY):  # a body in training mode may drop paths at random
            return dict(zip(self.spec.body, self.net.backbone.body.maps(images), strict=True))

    @functools.cached_property
    def targets(self) -> list[dict[str, Tensor]]:
        """Ground truth in torchvision's format."""
        return [{"boxes": target.boxes, "labels": target.labels} for target in self.batch.targets]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each resized image, without its padding."""
        return list(self.batch.sizes)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The detector's own supervised losses: torchvision's name -> scalar."""
        raise NotImplementedError

    def predictions(
        self, score: float | None = None, nms: float | None = None, top: int | None = None
    ) -> list[Detections]:
        """Return the detections in pixels of the resized image. A threshold of None is the detector's own."""
        raise NotImplementedError

    @geometry
    def detections(self) -> list[Detections]:
        """Predictions with the detector's own thresholds, in pixels of the original images."""
        return [finish(image, self.rule) for image in self.enlarged(self.predictions())]

    @property
    def rule(self) -> str:
        """The rule for the final detections, see `detection_rules`."""
        return str(self.detector.options.get("detection_rule", "torchvision"))

    def enlarged(self, detections: Sequence[Detections]) -> list[Detections]:
        """Scale detections from pixels of the resized images to pixels of the original images."""
        results = []
        for image, size, original in zip(detections, self.batch.sizes, self.batch.original_sizes, strict=True):
            boxes = resize_boxes(image.boxes, size, original)
            boxes = box_ops.clip_boxes_to_image(boxes, original) if self.rule == "detectron2" else boxes
            results.append(Detections(boxes, image.scores, image.labels))
        return results


class NeckView(LazyView):
    """The part of `distill.types.View` that detectors with a feature pyramid share."""

    outputs = LazyView.outputs | {"neck", "roi_features"}

    @property
    def neck(self) -> Pyramid:
        """The feature pyramid: nominal stride -> map."""
        raise NotImplementedError

    def with_neck(self, maps: Pyramid, targets: Sequence[Target] | None = None) -> NeckView:
        """Return a View of the same detector and images with other maps as its neck, and other targets if given.

        Its stages record gradients to the maps, also where this View is frozen.
        """
        batch = self.batch if targets is None else replace(self.batch, targets=tuple(targets))
        with torch.enable_grad():
            view = type(self)(self.detector, batch, self.training, False, self.seed)
        view._autocast = self._autocast
        vars(view)["neck"] = dict(maps)
        return view

    @property
    def pool(self) -> Any:
        """RoIAlign over this family's neck, built by `roi_align.region_pool`."""
        raise NotImplementedError

    def roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        """Return the pooled features (R, C, 7, 7) for one tensor of boxes (r, 4) per image, in order."""
        return self.keep("roi_features", boxes, self._roi_features)

    def _roi_features(self, boxes: Sequence[Tensor]) -> Tensor:
        return self.pooled(self.pool, boxes)

    def pooled(self, pool: Any, boxes: Sequence[Tensor]) -> Tensor:
        """Apply a RoIAlign to the neck's maps in float32; return the features in the dtype of the maps."""
        neck = self.neck
        with self.scope(autocast=False):
            maps = {str(level): upcast(x) for level, x in enumerate(neck.values())}
            return cast(Tensor, pool(maps, list(boxes), self.sizes)).to(next(iter(neck.values())).dtype)

    def keep(self, name: str, boxes: Sequence[Tensor], compute: Callable[[Sequence[Tensor]], T]) -> T:
        """Compute a result once for each box list, and cache it.

        The ids of the box tensors identify a list. The cache also holds the tensors, so that no id is reused.

        Args:
            name: name of the result.
            boxes: one tensor (r, 4) per image.
            compute: computes the result from `boxes`.

        Raises:
            DistillError: the number of box tensors is not the number of images.
        """
        if len(boxes) != len(self.batch):
            raise DistillError(f"{name}: expected one box tensor per image ({len(self.batch)}), got {len(boxes)}")
        key = name, tuple(map(id, boxes))
        if key not in self._kept:
            self._kept[key] = tuple(boxes), compute(boxes)
        return cast(T, self._kept[key][1])


class PyramidView(NeckView):
    """The part of `distill.types.View` that torchvision's detectors share: a pyramid with anchors and a dense head."""

    outputs = NeckView.outputs | {"anchors", "deltas", "anchor_targets", "anchor_boxes"}

    @network
    def neck(self) -> Pyramid:
        """The feature pyramid: nominal stride -> map."""
        fpn = self.net.backbone.fpn
        stages = list(self.body.values())[-len(fpn.inner_blocks) :]
        maps = fpn({str(index): x for index, x in enumerate(stages)})
        return dict(zip(self.spec.neck, maps.values(), strict=True))

    @geometry
    def anchors(self) -> dict[int, Tensor]:
        """Stride -> (H*W*A, 4) float32 in the order (row, column, anchor). All images share the anchors."""
        # Every stage halves the size and rounds up. The image size therefore gives the grids, without a forward pass.
        height, width = self.batch.images.shape[-2:]
        grids = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.spec.neck]
        generator = self.generator
        if generator.cell_anchors[0].dtype != torch.float32:  # torchvision's forward pass rounds them under autocast
            generator.cell_anchors = list(map(generator.generate_anchors, generator.sizes, generator.aspect_ratios))
        # The anchors get the dtype of the maps. These empty maps are float32.
        maps = [torch.empty((), device=self.device).expand(1, 1, *grid) for grid in grids]
        (flat,) = generator(ImageList(self.batch.images, [(height, width)]), maps)
        counts = [h * w * a for (h, w), a in zip(grids, self.spec.anchors.values(), strict=True)]
        return dict(zip(self.spec.neck, flat.split(counts), strict=True))

    @property
    def generator(self) -> Any:
        """torchvision's AnchorGenerator of this family."""
        raise NotImplementedError

    @property
    def deltas(self) -> Pyramid:
        """Stride -> box deltas (B, A*4, H, W)."""
        raise NotImplementedError

    @property
    def anchor_targets(self) -> AnchorTargets:
        """Targets of all anchors, and the sample of anchors that the detector's own loss uses."""
        raise NotImplementedError

    def anchor_boxes(self, deltas: Tensor) -> Tensor:
        """Apply deltas (B, N, 4) to all anchors; return boxes (B, N, 4), not clipped."""
        with self.scope(autocast=False):
            anchors = torch.cat(list(self.anchors.values()))
            return torch.stack([self._decode(image_deltas, anchors) for image_deltas in upcast(deltas)])

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Apply deltas (N, 4) to anchors (N, 4); return boxes (N, 4)."""
        raise NotImplementedError


def _generator(device: torch.device) -> torch.Generator:
    """Torch's global random generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return cast(torch.Generator, module.default_generators[index])


@contextmanager
def temporarily(module: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a torchvision module inside the context, and restore them afterwards. None changes nothing."""
    before = {name: getattr(module, name) for name, value in attributes.items() if value is not None}
    for name in before:
        setattr(module, name, attributes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
