"""Bodies, which compute the maps C2 to C5, and the feature pyramid on top of a body.

A body is built from a `StagedNetwork`: our `ResNet` with a width factor for every layer, one of torchvision's networks
in `ENDS`, or a network of timm. Module names, state dict keys and outputs equal torchvision's (the ResNet's at width
1). The classifier is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from distill.detectors.norms import check_norm, convert_norms, norm_layer
from distill.detectors.options import BackboneOptions
from distill.detectors.timm import TIMM, TimmBody
from distill.imaging.resizing import average_squares
from distill.types import DistillError

DEPTHS: dict[int, tuple[Any, tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Depth -> block class and blocks per stage. Depth 10 has one basic block per stage, and no ImageNet weights."""

RESNET = ("bn1", "layer1", "layer2", "layer3", "layer4")
"""Children that end the stem and C2 to C5 of a ResNet."""

ENDS: dict[str, tuple[str, ...]] = {
    "resnext50_32x4d": RESNET,
    "resnext101_32x8d": RESNET,
    "resnext101_64x4d": RESNET,
    "mobilenet_v2": ("1", "3", "6", "13", "17"),
    "mobilenet_v3_large": ("1", "3", "6", "12", "15"),
    "mobilenet_v3_small": ("0", "1", "3", "8", "11"),
    **{f"efficientnet_b{size}": ("1", "2", "3", "5", "7") for size in range(8)},
}
"""torchvision's name -> the children that end the stem (stride 2) and C2 to C5: the last block at each stride.

MobileNets and EfficientNets have a last 1x1 convolution that widens C5 for the classifier. It is left out.
"""

WIDE = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
"""Networks in `ENDS` that torchvision builds in other widths (`width_mult`)."""


class StagedNetwork(Protocol):
    """A network of a stem and the stages C2 to C5. Its children run in order."""

    ends: tuple[str, ...]
    """Names of the modules that end the stem and C2 to C5."""
    channels: tuple[int, ...]
    """Channels of C2 to C5."""


class ResNet(nn.Module):
    """ResNet without the classifier: conv1, bn1, relu, maxpool and layer1 to layer4, with torchvision's names.

    Args:
        depth: 10, 18, 34, 50, 101 or 152.
        width: factor on the channels of every layer.
        norm: a name in `distill.detectors.norms.NORMS`.
        norm_eps: epsilon of the norms.
        stride_in_1x1: whether the first 1x1 convolution of a bottleneck has the stride, and not the 3x3 convolution.
            The original ResNet has this form, and Detectron2's weights expect it.
        groups: groups of the 3x3 convolutions of a bottleneck. A ResNeXt has 32 or 64.
        group_width: channels of each group in C2. ResNeXt-101-32x8d has 32 groups of 8 channels.

    Raises:
        DistillError: an option has an invalid value.
    """

    def __init__(
        self,
        depth: int = 50,
        width: float = 1.0,
        norm: str = "batch",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        groups: int = 1,
        group_width: int = 64,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise DistillError(f"backbone.depth: expected one of {', '.join(map(str, DEPTHS))}, got {depth!r}")
        if not 0 < width <= 8:
            raise DistillError(
                f"backbone.width: expected a factor above 0 (1 the full ResNet, 0.25 a quarter), got {width!r}"
            )
        block, repeats = DEPTHS[depth]
        if groups < 1 or group_width < 1 or ((groups, group_width) != (1, 64) and (block is BasicBlock or width != 1)):
            raise DistillError(
                "backbone.groups, backbone.group_width: expected 1 and 64, or others for depth 50, 101 or 152 and "
                f"width 1, got {groups!r} and {group_width!r} for depth {depth} and width {width}"
            )
        layer, planes = norm_layer(norm, norm_eps), [max(1, round(64 * 2**stage * width)) for stage in range(4)]
        self.conv1 = nn.Conv2d(3, planes[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = layer(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = planes[0]
        for stage, (plane, count) in enumerate(zip(planes, repeats, strict=True)):
            stride = 1 if stage == 0 else 2
            parts = partial(block, groups=groups, base_width=group_width, norm_layer=layer)
            self.add_module(f"layer{stage + 1}", _stage(parts, channels, plane, count, stride, layer, stride_in_1x1))
            channels = plane * block.expansion
        self.depth, self.ends = depth, RESNET
        self.channels = tuple(plane * int(block.expansion) for plane in planes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Compute C5 of images (B, 3, H, W)."""
        for module in self.children():
            images = module(images)
        return images


def _stage(
    block: Any, channels: int, plane: int, count: int, stride: int, norm: Callable[..., nn.Module], in_1x1: bool
) -> nn.Sequential:
    out, shortcut = plane * block.func.expansion, None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(nn.Conv2d(channels, out, kernel_size=1, stride=stride, bias=False), norm(out))
    first = block(channels, plane, stride, shortcut)
    if in_1x1 and block.func is Bottleneck:
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    return nn.Sequential(first, *(block(out, plane) for _ in range(count - 1)))


class Layers(nn.Sequential):
    """A torchvision network in `ENDS` as a `StagedNetwork`. The layers after C5 are left out."""

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
    groups: int = 1,
    group_width: int = 64,
) -> Any:
    """Build the `StagedNetwork` with a given name and random weights.

    Args:
        name: ``resnet``, one of torchvision's names in `ENDS`, or ``timm/NAME``.
        depth: depth of the ResNet; None means 50. Other backbones accept only None.
        width: factor on the channels of the ResNet or of a network in `WIDE`. Other backbones accept only 1.
        norm: the replacement of every batch norm, a name in `distill.detectors.norms.NORMS`.
        norm_eps: epsilon of the norms. None keeps the network's own epsilon (1e-5 for the ResNet).
        stride_in_1x1: see `ResNet`. Other backbones accept only false.
        groups: see `ResNet`. Other backbones accept only 1.
        group_width: see `ResNet`. Other backbones accept only 64.

    Raises:
        DistillError: the name is unknown, or an option does not fit the network.
    """
    if name == "resnet":
        eps = 1e-5 if norm_eps is None else norm_eps
        return ResNet(50 if depth is None else depth, width, norm, eps, stride_in_1x1, groups, group_width)
    check_norm(norm)
    if depth is not None or stride_in_1x1 or (groups, group_width) != (1, 64):
        raise DistillError(
            "backbone.depth, stride_in_1x1, groups, group_width: expected null, false, 1 and 64, as only "
            f"backbone.name=resnet has them, got {depth!r}, {stride_in_1x1!r}, {groups!r} and {group_width!r} with "
            f"{name!r}"
        )
    if not 0 < width <= 8 or (width != 1 and name not in WIDE):
        wide = ", ".join(("resnet", *WIDE))
        raise DistillError(f"backbone.width: expected 1 for {name}, or a factor above 0 for {wide}, got {width!r}")
    body = TimmBody(name.removeprefix(TIMM)) if name.startswith(TIMM) else _torchvisions(name, width)
    convert_norms(body, norm, norm_eps)
    return body


def has_batch_norms(options: BackboneOptions) -> bool:
    """Whether a backbone has batch norms, which other kinds of norms can replace. Allocates no memory for weights.

    Args:
        options: the norm's kind and epsilon are not read.

    Raises:
        DistillError: see `build_backbone`.
    """
    with torch.device("meta"):
        body = build_backbone(**network_options(replace(options, norm="batch", norm_eps=None)))
    return any(isinstance(layer, nn.BatchNorm2d) for layer in body.modules())


def network_options(options: BackboneOptions) -> dict[str, Any]:
    """Return the options that decide the network: the arguments of `build_backbone`."""
    return {name: value for name, value in asdict(options).items() if name not in ("trainable_stages", "weights")}


def _torchvisions(backbone: str, width: float) -> Layers:
    if backbone not in ENDS:
        raise DistillError(f"backbone.name: expected resnet, {TIMM}NAME, or one of {', '.join(ENDS)}, got {backbone!r}")
    options = {"width_mult": width} if backbone in WIDE else {}
    network = models.get_model(backbone, weights=None, **options)
    return Layers(getattr(network, "features", network), ENDS[backbone])


def resolved_options(body: nn.Module) -> dict[str, Any]:
    """Return the options that a body resolves from None.

    ``depth`` is the depth of a ResNet, and None for other bodies. ``norm_eps`` is the epsilon that all norms share, and
    None if the epsilons differ or no norm exists.
    """
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    epsilons = {layer.eps for layer in body.modules() if isinstance(layer, kinds)}
    return {"depth": getattr(body, "depth", None), "norm_eps": epsilons.pop() if len(epsilons) == 1 else None}


def imagenet_weights(backbone: str, depth: int | None) -> Any:
    """Return torchvision's enum of ImageNet weights for a backbone, or None if torchvision has no such network."""
    name = f"resnet{depth}" if backbone == "resnet" else backbone
    return models.get_model_weights(name) if name in models.list_models(module=models) else None


def body_state(state: Mapping[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Select the tensors of a classifier's state dict that belong to the body, under the body's names.

    All tensors except those of the classification head belong to the body.
    """
    if isinstance(body, TimmBody):  # `features_only` networks join the names of a sequence and its parts by underscores
        flat = {name.replace(".", "_"): value for name, value in state.items()}
        known = {name: name.removeprefix("net.").replace(".", "_") for name in body.state_dict()}
        return {name: flat[joined] for name, joined in known.items() if joined in flat}
    head = ("fc.", "classifier.", f"features.{len(list(body.children()))}.")
    return {name.removeprefix("features."): value for name, value in state.items() if not name.startswith(head)}


def freeze(body: Any, trainable_stages: int) -> list[str]:
    """Stop the gradients of the first stages of a body.

    Args:
        body: with the stages stem, C2, C3, C4 and C5.
        trainable_stages: how many stages stay trainable, counted from C5 down: 0 freezes all, 5 freezes none.

    Returns:
        Names of the frozen modules.

    Raises:
        DistillError: `trainable_stages` is not from 0 to 5.
    """
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
    """torchvision's `IntermediateLayerGetter` over a `StagedNetwork`.

    It also returns the maps of stages that the neck does not use.

    Args:
        network: a `StagedNetwork`.
        first: the first stage that the neck uses; 1 = C2.
    """

    input_stride = 1
    """See `average_squares`."""

    def __init__(self, network: Any, first: int) -> None:
        super().__init__(network, {end: str(index) for index, end in enumerate(network.ends[first:])})
        self.ends = network.ends

    def forward(self, images: Tensor) -> Any:
        """Compute the stages that the neck uses, of images (B, 3, H, W), with torchvision's names."""
        return super().forward(average_squares(images, self.input_stride))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the maps C2 to C5 of images (B, 3, H, W)."""
        maps, images = [], average_squares(images, self.input_stride)
        for name, module in self.items():
            images = module(images)
            if name in self.ends[1:]:
                maps.append(images)
        return maps


class Backbone(BackboneWithFPN):  # type: ignore[misc]
    """torchvision's `BackboneWithFPN`, built over an existing body."""

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        neck_channels: int,
        extra: nn.Module,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), neck_channels, extra_blocks=extra, norm_layer=norm_layer)
        self.out_channels = neck_channels


def with_fpn(
    network: Any,
    first: int,
    neck_channels: int,
    extra: nn.Module,
    norm_layer: Callable[..., nn.Module] | None = None,
) -> Backbone:
    """Return torchvision's backbone with a feature pyramid.

    Args:
        network: a `StagedNetwork`.
        first: the first stage that the pyramid uses (1 = C2). The last stage is C5.
        neck_channels: channels of every pyramid level.
        extra: the module that computes the levels above P5.
        norm_layer: constructor of the norm after each convolution of the pyramid; None: no norms.
    """
    if isinstance(network, TimmBody):
        network.first, body = first, network
    else:
        body = Body(network, first)
    return Backbone(body, network.channels[first - 1 :], neck_channels, extra, norm_layer)


def _leaves(module: nn.Module) -> list[str]:
    """Names of the modules without children, in order of registration, which is the order of execution."""
    return [name for name, inner in module.named_modules() if next(inner.children(), None) is None]


def _within(name: str, parent: str) -> bool:
    return f"{name}.".startswith(f"{parent}.")
