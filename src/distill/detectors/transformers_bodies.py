"""Configurations of the backbones in transformers: ResNet-D and HGNetV2, of any width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from distill.detectors.options import BackboneOptions
from distill.types import DistillError

RESNETS = {
    10: ("basic", (1, 1, 1, 1)),
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
"""Depth -> kind of block and blocks per stage of a ResNet-D (He et al. 2019, "Bag of Tricks")."""


class HGNet(NamedTuple):
    """Sizes of an HGNetV2 (Baidu 2023), stage by stage."""

    stem: tuple[int, int]
    inputs: tuple[int, ...]
    middles: tuple[int, ...]
    outputs: tuple[int, ...]
    blocks: tuple[int, ...]
    layers: int
    affine: bool = False
    """Whether trained factors and shifts follow the activations."""
    kernels: tuple[int, ...] = (3, 3, 5, 5)
    """Sides of the convolutions."""


HGNETS = {
    "hgnet_b0": HGNet((16, 16), (16, 64, 256, 512), (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, True),
    "hgnet_b2": HGNet((24, 32), (32, 96, 384, 768), (32, 64, 128, 256), (96, 384, 768, 1536), (1, 1, 3, 1), 4, True),
    "hgnet_b4": HGNet(
        (32, 48), (48, 128, 512, 1024), (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1), 6, False
    ),
    "hgnet_b5": HGNet(
        (32, 64), (64, 128, 512, 1024), (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2), 6, False
    ),
    # Three stages: strides 4, 8 and 16.
    "hgnet_pico": HGNet((16, 16), (16, 64, 256), (16, 32, 64), (64, 256, 512), (1, 1, 2), 3, True, (3, 3, 5)),
    "hgnet_femto": HGNet((16, 16), (16, 64, 256), (16, 32, 64), (64, 256, 512), (1, 1, 1), 3, True, (3, 3, 5)),
    "hgnet_atto": HGNet((16, 16), (16, 64, 256), (16, 32, 64), (64, 256, 256), (1, 1, 1), 3, True, (3, 3, 3)),
}
"""Name -> sizes. D-FINE N and S have B0, M has B2, L has B4, X has B5. DEIMv2 N has B0.
DEIMv2 Pico, Femto and Atto have the backbones of the same names."""

LAST_STRIDES = {"resnet_d": 32} | {name: 2 ** (1 + len(sizes.outputs)) for name, sizes in HGNETS.items()}
"""Names of these backbones, and the strides of their last maps."""


def body_configuration(library: Any, backbone: BackboneOptions, strides: tuple[int, ...]) -> tuple[Any, list[int]]:
    """Return transformers' configuration of a backbone, and the channels of its stages from C2 on.

    Args:
        library: transformers.
        backbone: the options.
        strides: strides of the maps that the encoder reads. The last one must be that of the last stage, because a
            stage that nothing reads gets no gradient.

    Raises:
        DistillError: an option does not fit the network, or the backbone ends at another stride.
    """
    name, width, stages = backbone.name, backbone.width, [stride.bit_length() - 2 for stride in strides]
    fitting = [body for body, last in LAST_STRIDES.items() if last == strides[-1]]
    if name not in fitting:
        end = f", which ends at stride {LAST_STRIDES[name]}" if name in LAST_STRIDES else ""
        raise DistillError(
            f"backbone.name: expected one of {', '.join(fitting)}, whose last map has stride {strides[-1]}, got "
            f"{name!r}{end}"
        )
    if (backbone.groups, backbone.group_width) != (1, 64):
        raise DistillError(
            f"backbone.groups, backbone.group_width: expected 1 and 64, as {name} has no groups, got "
            f"{backbone.groups!r} and {backbone.group_width!r}"
        )
    if not 0 < width <= 8:
        raise DistillError(f"backbone.width: expected a factor above 0 (1 the full {name}), got {width!r}")

    def scaled(channels: int) -> int:
        return max(8, 8 * round(channels * width / 8))

    if name != "resnet_d":
        if backbone.depth is not None or backbone.stride_in_1x1:
            raise DistillError(
                f"backbone.depth, backbone.stride_in_1x1: expected null and false, as only resnet_d has them, got "
                f"{backbone.depth!r} and {backbone.stride_in_1x1!r} with {name}"
            )
        return _hgnet(library, HGNETS[name], scaled, stages)
    depth = 50 if backbone.depth is None else backbone.depth
    if depth not in RESNETS:
        raise DistillError(f"backbone.depth: expected one of {', '.join(map(str, RESNETS))}, got {depth!r}")
    kind, blocks = RESNETS[depth]
    channels = [scaled(64 * 2**stage) * (4 if kind == "bottleneck" else 1) for stage in range(4)]
    config = library.RTDetrResNetConfig(
        embedding_size=scaled(64),
        hidden_sizes=channels,
        depths=list(blocks),
        layer_type=kind,
        downsample_in_bottleneck=backbone.stride_in_1x1,
        out_indices=stages,
    )
    return config, channels


def _hgnet(library: Any, sizes: HGNet, scaled: Callable[[int], int], stages: list[int]) -> tuple[Any, list[int]]:
    channels, count = [scaled(size) for size in sizes.outputs], len(sizes.outputs)
    config = library.HGNetV2Config(
        embedding_size=scaled(sizes.stem[1]),
        hidden_sizes=channels,
        stem_channels=[3, *map(scaled, sizes.stem)],
        stage_in_channels=[scaled(size) for size in sizes.inputs],
        stage_mid_channels=[scaled(size) for size in sizes.middles],
        stage_out_channels=channels,
        stage_num_blocks=list(sizes.blocks),
        stage_numb_of_layers=[sizes.layers] * count,
        stage_downsample=[False, True, True, True][:count],
        stage_downsample_strides=[2] * count,
        stage_light_block=[False, False, True, True][:count],
        stage_kernel_size=list(sizes.kernels),
        depths=[sizes.layers] * count,
        use_learnable_affine_block=sizes.affine,
        out_indices=stages,
    )
    return config, channels


def initialize_convolutions(net: nn.Module, body: nn.Module) -> None:
    """Give convolutions and batch norms random weights with which signals keep their size.

    transformers draws the weights of a whole network with a standard deviation of 0.01, norms included. The encoder's
    maps are then 1e-6, and all queries are equal.

    Args:
        net: the network, changed in place.
        body: its backbone. Its convolutions get the weights of a ResNet, the others those of torch.
    """
    inner = set(body.modules())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()
            if module in inner:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
