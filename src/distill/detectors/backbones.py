"""Bodies that give C2..C5, their normalisation, and the feature pyramid on top.

A body is a `Trunk`: a ResNet of ours, with a true width factor, any of torchvision's networks in `ENDS`, or one of
timm's. Modules, keys and numbers are torchvision's (the ResNet's at width 1), without the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

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

TIMM = "timm/"
"""What the name of a timm backbone begins with."""


class Trunk(Protocol):
    """A network whose children run in order; what it ends the stem and C2..C5 with, and the channels of C2..C5."""

    ends: tuple[str, ...]
    channels: tuple[int, ...]


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm on its running statistics, which never move; weight and bias are trained (mmdet's `norm_eval`).

    The behaviour does not hang on `.training`, so whatever switches modes cannot wake the statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """Statistics over all processes on an accelerator; on a CPU, where torch has none, over the own process."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if input.device.type != "cpu":
            return super().forward(input)
        update = self.training and self.running_mean is not None
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factor = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, update, factor, self.eps
        )


NORMS: dict[str, Callable[..., nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "fixed": FixedBatchNorm2d,
    "live": nn.BatchNorm2d,
    "sync": SyncBatchNorm2d,
}


class _Activated(nn.Module):
    """Puts timm's drop and activation behind a norm, as timm's own batch norms have them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


class FrozenBatchNormAct2d(_Activated, FrozenBatchNorm2d):  # type: ignore[misc]
    """`FrozenBatchNorm2d` with an activation."""


class FixedBatchNormAct2d(_Activated, FixedBatchNorm2d):
    """`FixedBatchNorm2d` with an activation."""


class SyncBatchNormAct2d(_Activated, SyncBatchNorm2d):
    """`SyncBatchNorm2d` with an activation."""


ACTIVATED: dict[str, Callable[..., Any]] = {
    "frozen": FrozenBatchNormAct2d,
    "fixed": FixedBatchNormAct2d,
    "sync": SyncBatchNormAct2d,
}


def norm_layer(norm: str, eps: float) -> Callable[..., nn.Module]:
    """The constructor behind a norm's name: frozen, fixed, live or sync."""
    return partial(NORMS[check_norm(norm)], eps=eps)


def check_norm(norm: str) -> str:
    """The name of a norm, if it is one."""
    if norm not in NORMS:
        raise DistillError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    return norm


def convert_norms(body: nn.Module, norm: str, eps: float | None) -> None:
    """Turn every batch norm below `body`, timm's with an activation too, into `norm`; values stay, and `eps` if None.

    Raises:
        DistillError: there is no batch norm, so that nothing but ``live`` with its own epsilon can be had.
    """
    found = {name: layer for name, layer in body.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    if not found and (norm != "live" or eps is not None):
        raise DistillError(f"norm: this backbone has no batch norm to make {norm}; set norm=live and norm_eps=null")
    for name, layer in found.items():
        body.set_submodule(name, _converted(layer, check_norm(norm), layer.eps if eps is None else eps))


def _converted(layer: nn.BatchNorm2d, norm: str, eps: float) -> nn.Module:
    if norm == "live":
        layer.eps = eps
        return layer
    activated = hasattr(layer, "act")
    momentum = {} if norm == "frozen" else {"momentum": layer.momentum}
    new: nn.Module = (ACTIVATED if activated else NORMS)[norm](layer.num_features, eps=eps, **momentum)
    new.load_state_dict(layer.state_dict(), strict=True)
    if activated:
        new.drop, new.act = layer.drop, layer.act
    return new


def set_eps(module: nn.Module, eps: float) -> None:
    """Give every normalisation on running statistics below `module` this epsilon; live ones keep theirs."""
    for layer in module.modules():
        if isinstance(layer, (FrozenBatchNorm2d, FixedBatchNorm2d)):
            layer.eps = eps


class ResNet(nn.Module):
    """conv1, bn1, relu, maxpool, layer1..layer4, as torchvision names them, every width times `width`.

    `depth` is one of 10, 18, 34, 50, 101, 152; `stride_in_1x1` puts the stride of a bottleneck into its first
    convolution (the original form, which Detectron2's weights expect) instead of its 3x3.
    """

    def __init__(
        self,
        depth: int = 50,
        width: float = 1.0,
        norm: str = "live",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise DistillError(f"depth: expected one of {', '.join(map(str, DEPTHS))}, got {depth!r}")
        if not 0 < width <= 8:
            raise DistillError(f"width: expected a factor above 0 (1 the full ResNet, 0.25 a quarter), got {width!r}")
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


class TimmBody(nn.Module):
    """One of timm's ``features_only`` networks, `net`: a `Trunk`, and at once the body below a neck.

    Raises:
        DistillError: timm is missing, does not know the name, or has no maps (B, C, H, W) of strides 4, 8, 16 and 32.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm_network(name, features_only=True)
        info = self.net.feature_info
        at = {stride: index for index, stride in enumerate(info.reduction())}  # the last map at each stride
        if not at.keys() >= {4, 8, 16, 32}:
            raise DistillError(f"backbone: expected maps of strides 4, 8, 16, 32; {TIMM}{name} has {info.reduction()}")
        self.chosen = [at[stride] for stride in (4, 8, 16, 32)]
        self.channels = tuple(info.channels()[index] for index in self.chosen)
        stages = [_below(self.net, info.module_name()[index]) for index in self.chosen]
        stem = _below(self.net, info.module_name()[at[2]]) if 2 in at else _before(self.net, stages[0])
        self.ends = tuple(f"net.{end}" for end in (stem, *stages))
        self.first = 1
        self._check(name)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> C2..C5."""
        found = self.net(images)
        return [found[index] for index in self.chosen]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the stages that the neck is built on, by torchvision's names."""
        return {str(index): x for index, x in enumerate(self.maps(images)[self.first - 1 :])}

    @torch.no_grad()
    def _check(self, name: str) -> None:
        try:
            shapes = [tuple(x.shape) for x in self.eval().maps(torch.zeros(1, 3, 64, 96))]
        except Exception as error:  # whatever a network of a fixed size raises
            raise DistillError(f"backbone: {TIMM}{name} does not take an image of 64 x 96 pixels: {error}") from error
        expected = [(1, c, 64 // s, 96 // s) for c, s in zip(self.channels, (4, 8, 16, 32), strict=True)]
        if shapes != expected:
            raise DistillError(f"backbone: {TIMM}{name} gives maps of shapes {shapes}, expected {expected}")
        self.train()


def timm_network(name: str, **options: Any) -> Any:
    """timm's network of that name, built with its `options`.

    Raises:
        DistillError: timm is missing, does not know the name, or cannot have the options or fetch its weights.
    """
    try:
        import timm
    except ImportError as error:
        raise DistillError(f"backbone: {TIMM}{name} needs timm: install 'distill[timm]'") from error
    if ":" in name or "/" in name:  # to timm the address of a model, on the Hub or in a folder
        raise DistillError(
            f"backbone: {TIMM}{name} is an address; expected one of timm's own names, timm.list_models()"
        )
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        asked = ", ".join(f"{option}={value}" for option, value in options.items())
        remedy = "timm.list_models() has the names; weights may come from a file, by backbone_weights"
        raise DistillError(f"backbone: timm cannot make {name} with {asked} ({error}); {remedy}") from error


def _below(net: nn.Module, name: str) -> str:
    """Where timm put a module of the classifier: at its own path, or joined by underscores."""
    return name if name in dict(net.named_modules()) else name.replace(".", "_")


def _before(net: nn.Module, name: str) -> str:
    """The last leaf before the module `name`."""
    leaves = _leaves(net)
    return leaves[max(0, next(i for i, leaf in enumerate(leaves) if _within(leaf, name)) - 1)]


def _leaves(module: nn.Module) -> list[str]:
    """Names of the modules without children, in order of execution, which is that of registration."""
    return [name for name, each in module.named_modules() if next(each.children(), None) is None]


def _within(name: str, parent: str) -> bool:
    return f"{name}.".startswith(f"{parent}.")


def trunk(
    backbone: str = "resnet",
    depth: int | None = None,
    width: float = 1.0,
    norm: str = "live",
    norm_eps: float | None = None,
    stride_in_1x1: bool = False,
) -> Any:
    """The `Trunk` behind a backbone's name, with random weights.

    Args:
        backbone: ``resnet``, one of torchvision's names in `ENDS`, or ``timm/NAME``.
        depth: of the ResNet; None is 50 there, and all that another backbone takes.
        width: factor on the channels, of the ResNet or one in `WIDE`.
        norm: what becomes of every batch norm, see `NORMS`.
        norm_eps: its epsilon; None keeps the network's own (1e-5 of the ResNet).
        stride_in_1x1: see `ResNet`.
    """
    if backbone == "resnet":
        return ResNet(
            50 if depth is None else depth, width, norm, 1e-5 if norm_eps is None else norm_eps, stride_in_1x1
        )
    check_norm(norm)
    if depth is not None or stride_in_1x1:
        raise DistillError(
            f"depth, stride_in_1x1: expected null and false, as only backbone=resnet has them, got {depth!r} and"
            f" {stride_in_1x1!r} with {backbone!r}"
        )
    if not 0 < width <= 8 or (width != 1 and backbone not in WIDE):
        wide = ", ".join(("resnet", *WIDE))
        raise DistillError(f"width: expected 1 for {backbone}, or a factor above 0 for {wide}, got {width!r}")
    body = TimmBody(backbone.removeprefix(TIMM)) if backbone.startswith(TIMM) else _torchvisions(backbone, width)
    convert_norms(body, norm, norm_eps)
    return body


def _torchvisions(backbone: str, width: float) -> Layers:
    if backbone not in ENDS:
        raise DistillError(f"backbone: expected resnet, {TIMM}NAME, or one of {', '.join(ENDS)}, got {backbone!r}")
    options = {"width_mult": width} if backbone in WIDE else {}
    network = models.get_model(backbone, weights=None, **options)
    return Layers(getattr(network, "features", network), ENDS[backbone])


def settled(body: nn.Module) -> dict[str, Any]:
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
        raise DistillError(f"trainable_stages: expected 0 (all frozen) to 5 (all trained), got {trainable_stages!r}")
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
