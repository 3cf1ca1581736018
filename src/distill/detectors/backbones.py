"""Bodies that give C2..C5, and the feature pyramid on top.

A body is a `Trunk`: a ResNet of ours, with a true width factor, any of torchvision's networks in `ENDS`, or one of
timm's. Modules, keys and numbers are torchvision's (the ResNet's at width 1), without the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from distill.detectors.norms import check_norm, convert_norms, norm_layer
from distill.detectors.timm import TIMM, TimmBody
from distill.types import DistillError

DEPTHS: dict[int, tuple[Any, tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Depth -> block and blocks per stage. Depth 10 has no ImageNet weights: one basic block a stage."""

RESNET = ("bn1", "layer1", "layer2", "layer3", "layer4")

ENDS: dict[str, tuple[str, ...]] = {
    "resnext50_32x4d": RESNET,
    "resnext101_32x8d": RESNET,
    "resnext101_64x4d": RESNET,
    "mobilenet_v2": ("1", "3", "6", "13", "17"),
    "mobilenet_v3_large": ("1", "3", "6", "12", "15"),
    "mobilenet_v3_small": ("0", "1", "3", "8", "11"),
    **{f"efficientnet_b{size}": ("1", "2", "3", "5", "7") for size in range(8)},
}
"""torchvision's name -> the children that end the stem (stride 2) and C2..C5: the last block at each stride.

The 1x1 convolution with which MobileNets and EfficientNets only widen C5 for their classifier is left out.
"""

WIDE = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
"""Those of them that come in other widths (`width_mult`)."""


class Trunk(Protocol):
    """A network whose children run in order; what it ends the stem and C2..C5 with, and the channels of C2..C5."""

    ends: tuple[str, ...]
    channels: tuple[int, ...]


class ResNet(nn.Module):
    """conv1, bn1, relu, maxpool, layer1..layer4, as torchvision names them, every width times `width`.

    `depth` is one of 10, 18, 34, 50, 101, 152; `stride_in_1x1` puts the stride of a bottleneck into its first
    convolution (the original form, which Detectron2's weights expect) instead of its 3x3.
    """

    def __init__(
        self,
        depth: int = 50,
        width: float = 1.0,
        norm: str = "batch",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise DistillError(f"backbone.depth: expected one of {', '.join(map(str, DEPTHS))}, got {depth!r}")
        if not 0 < width <= 8:
            raise DistillError(
                f"backbone.width: expected a factor above 0 (1 the full ResNet, 0.25 a quarter), got {width!r}"
            )
        block, repeats = DEPTHS[depth]
        layer, planes = norm_layer(norm, norm_eps), [max(1, round(64 * 2**stage * width)) for stage in range(4)]
        self.conv1 = nn.Conv2d(3, planes[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = layer(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = planes[0]
        for stage, (plane, count) in enumerate(zip(planes, repeats, strict=True)):
            stride = 1 if stage == 0 else 2
            self.add_module(f"layer{stage + 1}", _stage(block, channels, plane, count, stride, layer, stride_in_1x1))
            channels = plane * block.expansion
        self.depth, self.ends = depth, RESNET
        self.channels = tuple(plane * int(block.expansion) for plane in planes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> C5."""
        for module in self.children():
            images = module(images)
        return images


def _stage(
    block: Any, channels: int, plane: int, count: int, stride: int, norm: Callable[..., nn.Module], in_1x1: bool
) -> nn.Sequential:
    out, shortcut = plane * block.expansion, None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(nn.Conv2d(channels, out, kernel_size=1, stride=stride, bias=False), norm(out))
    first = block(channels, plane, stride, shortcut, norm_layer=norm)
    if in_1x1 and block is Bottleneck:
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    return nn.Sequential(first, *(block(out, plane, norm_layer=norm) for _ in range(count - 1)))


class Layers(nn.Sequential):
    """One of torchvision's networks in `ENDS` as a `Trunk`, up to C5."""

    def __init__(self, network: nn.Module, ends: tuple[str, ...]) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
            if name == ends[-1]:
                break
        self.ends = ends
        self.channels = tuple(_out_channels(self.get_submodule(end)) for end in ends[1:])


def _out_channels(part: Any) -> int:
    last: Any = part[-1] if isinstance(part, nn.Sequential) else part
    return int(last.conv3.out_channels if isinstance(last, Bottleneck) else last.out_channels)


def build_backbone(
    name: str = "resnet",
    depth: int | None = None,
    width: float = 1.0,
    norm: str = "batch",
    norm_eps: float | None = None,
    stride_in_1x1: bool = False,
) -> Any:
    """The `Trunk` behind a backbone's name, with random weights.

    Args:
        name: ``resnet``, one of torchvision's names in `ENDS`, or ``timm/NAME``.
        depth: of the ResNet; None is 50 there, and all that another backbone takes.
        width: factor on the channels, of the ResNet or one in `WIDE`.
        norm: what becomes of every batch norm, see `distill.detectors.norms.NORMS`.
        norm_eps: its epsilon; None keeps the network's own (1e-5 of the ResNet).
        stride_in_1x1: see `ResNet`.
    """
    if name == "resnet":
        return ResNet(
            50 if depth is None else depth, width, norm, 1e-5 if norm_eps is None else norm_eps, stride_in_1x1
        )
    check_norm(norm)
    if depth is not None or stride_in_1x1:
        raise DistillError(
            f"backbone.depth, backbone.stride_in_1x1: expected null and false, as only backbone.name=resnet has them, got {depth!r} and"
            f" {stride_in_1x1!r} with {name!r}"
        )
    if not 0 < width <= 8 or (width != 1 and name not in WIDE):
        wide = ", ".join(("resnet", *WIDE))
        raise DistillError(f"backbone.width: expected 1 for {name}, or a factor above 0 for {wide}, got {width!r}")
    body = TimmBody(name.removeprefix(TIMM)) if name.startswith(TIMM) else _torchvisions(name, width)
    convert_norms(body, norm, norm_eps)
    return body


def _torchvisions(backbone: str, width: float) -> Layers:
    if backbone not in ENDS:
        raise DistillError(f"backbone.name: expected resnet, {TIMM}NAME, or one of {', '.join(ENDS)}, got {backbone!r}")
    options = {"width_mult": width} if backbone in WIDE else {}
    network = models.get_model(backbone, weights=None, **options)
    return Layers(getattr(network, "features", network), ENDS[backbone])


def resolved_options(body: nn.Module) -> dict[str, Any]:
    """What `trunk` chose where it was given None: the ResNet's depth, and the epsilon if all norms share one."""
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    found = {layer.eps for layer in body.modules() if isinstance(layer, kinds)}
    return {"depth": getattr(body, "depth", None), "norm_eps": found.pop() if len(found) == 1 else None}


def imagenet_weights(backbone: str, depth: int | None) -> Any:
    """torchvision's enum of ImageNet weights for a backbone, or None."""
    name = f"resnet{depth}" if backbone == "resnet" else backbone
    return models.get_model_weights(name) if name in models.list_models(module=models) else None


def body_state(state: Mapping[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """What of a whole classifier's state dict belongs to the body, under the body's names: all but its head."""
    if isinstance(body, TimmBody):  # timm joins the names of a sequence and its parts by underscores
        flat = {name.replace(".", "_"): value for name, value in state.items()}
        known = {name: name.removeprefix("net.").replace(".", "_") for name in body.state_dict()}
        return {name: flat[theirs] for name, theirs in known.items() if theirs in flat}
    head = ("fc.", "classifier.", f"features.{len(list(body.children()))}.")
    return {name.removeprefix("features."): value for name, value in state.items() if not name.startswith(head)}


def freeze(body: Any, trainable_stages: int) -> list[str]:
    """Stop the gradients of all but the last of C5, C4, C3, C2 and the stem; returns the names of the stopped parts."""
    if trainable_stages not in range(len(body.ends) + 1):
        raise DistillError(
            f"backbone.trainable_stages: expected 0 (all frozen) to 5 (all trained), got {trainable_stages!r}"
        )
    if trainable_stages == len(body.ends):
        return []
    leaves, end = _leaves(body), body.ends[-1 - trainable_stages]
    last = max(index for index, leaf in enumerate(leaves) if _within(leaf, end))
    trained = leaves[last + 1 :]
    frozen = [name for name, _ in body.named_modules() if name and not any(_within(leaf, name) for leaf in trained)]
    for name in frozen:
        body.get_submodule(name).requires_grad_(False)
    return frozen


class Body(IntermediateLayerGetter):  # type: ignore[misc]
    """torchvision's holder of a trunk's children, which hands out C2 too where the neck leaves it aside."""

    def __init__(self, trunk: Any, first: int) -> None:
        super().__init__(trunk, {end: str(index) for index, end in enumerate(trunk.ends[first:])})
        self.ends = trunk.ends

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> C2..C5."""
        found = []
        for name, module in self.items():
            images = module(images)
            if name in self.ends[1:]:
                found.append(images)
        return found


class Backbone(BackboneWithFPN):  # type: ignore[misc]
    """torchvision's, over a body that is already there."""

    def __init__(self, body: nn.Module, channels: Sequence[int], neck_channels: int, extra: nn.Module) -> None:
        nn.Module.__init__(self)
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), neck_channels, extra_blocks=extra)
        self.out_channels = neck_channels


def with_fpn(trunk: Any, first: int, neck_channels: int, extra: nn.Module) -> Backbone:
    """torchvision's backbone with a pyramid over stages `first` (1 = C2) to 4, and `extra` levels above."""
    if isinstance(trunk, TimmBody):
        trunk.first, body = first, trunk
    else:
        body = Body(trunk, first)
    return Backbone(body, trunk.channels[first - 1 :], neck_channels, extra)


def _leaves(module: nn.Module) -> list[str]:
    """Names of the modules without children, in order of execution, which is that of registration."""
    return [name for name, each in module.named_modules() if next(each.children(), None) is None]


def _within(name: str, parent: str) -> bool:
    return f"{name}.".startswith(f"{parent}.")
