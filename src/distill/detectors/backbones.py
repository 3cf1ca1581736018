"""ResNets with a true width factor, their normalisation, and the feature pyramid on top.

At width 1 the modules, the keys and the numbers are those of `torchvision.models.resnet` without its classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

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

STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")
"""In the order in which `trainable_stages` frees them; the stem brings its norm `bn1` along."""


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


def norm_layer(norm: str, eps: float) -> Callable[..., nn.Module]:
    """The constructor behind a norm's name: frozen, fixed, live or sync."""
    if norm not in NORMS:
        raise DistillError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    return partial(NORMS[norm], eps=eps)


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
        self.channels = tuple(plane * int(block.expansion) for plane in planes)
        """Channels of C2..C5."""
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


def freeze(body: nn.Module, trainable_stages: int) -> list[str]:
    """Stop the gradients of all but the last of C5, C4, C3, C2 and the stem; returns the names of the stopped parts."""
    if trainable_stages not in range(len(STAGES) + 1):
        raise DistillError(f"trainable_stages: expected 0 (all frozen) to 5 (all trained), got {trainable_stages!r}")
    free = {*STAGES[:trainable_stages], *(["bn1"] if trainable_stages == len(STAGES) else [])}
    frozen = {name: part for name, part in body.named_children() if name not in free and part.state_dict()}
    for part in frozen.values():
        part.requires_grad_(False)
    return list(frozen)


def with_fpn(body: ResNet, first: int, neck_channels: int, extra: nn.Module) -> Any:
    """torchvision's backbone with a pyramid over stages `first` (1 = C2) to 4, and `extra` levels above."""
    layers = {f"layer{stage}": str(stage - first) for stage in range(first, 5)}
    return BackboneWithFPN(body, layers, list(body.channels[first - 1 :]), neck_channels, extra_blocks=extra)
