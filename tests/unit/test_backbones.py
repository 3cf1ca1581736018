"""Our ResNet is torchvision's at width 1, truly narrower below it, and its norms keep their word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)

from distill.detectors.anchor_free import FCOS
from distill.detectors.backbones import FixedBatchNorm2d, ResNet, SyncBatchNorm2d, set_eps
from distill.detectors.one_stage import RetinaNet
from distill.detectors.two_stage import FasterRCNN
from distill.types import DistillError


def theirs(depth: int) -> nn.Module:
    model = getattr(resnet, f"resnet{depth}")(weights=None)
    del model.avgpool, model.fc
    return model


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_equals_torchvision_at_width_one(depth: int) -> None:
    ours, other = ResNet(depth), theirs(depth)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in other.named_modules()]
    assert list(ours.state_dict()) == list(other.state_dict())
    other.load_state_dict(ours.state_dict(), strict=True)
    x = torch.rand(1, 3, 65, 96)
    expected = x
    for module in other.children():
        expected = module(expected)
    assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("depth", [101, 152])
def test_deep_ones_have_torchvisions_shapes(depth: int) -> None:
    with torch.device("meta"):
        ours, other = ResNet(depth).state_dict(), theirs(depth).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in other.items()}


@pytest.mark.parametrize(
    ("depth", "width", "channels"),
    [(50, 0.25, (64, 128, 256, 512)), (18, 0.5, (32, 64, 128, 256)), (10, 0.1, (6, 13, 26, 51)), (34, 1, None)],
)
def test_width_scales_every_stage(depth: int, width: float, channels: tuple[int, ...] | None) -> None:
    body = ResNet(depth, width)
    found, x = [], torch.rand(1, 3, 64, 64)
    for name, module in body.named_children():
        x = module(x)
        if name.startswith("layer"):
            found.append(x.shape[1])
    assert tuple(found) == body.channels == (channels or (64, 128, 256, 512))
    assert body.conv1.out_channels == max(1, round(64 * width))


def test_stride_in_1x1_moves_the_stride_only() -> None:
    plain, original = ResNet(50, 0.25), ResNet(50, 0.25, stride_in_1x1=True)
    strides = [(m.layer2[0].conv1.stride, m.layer2[0].conv2.stride) for m in (plain, original)]
    assert strides == [((1, 1), (2, 2)), ((2, 2), (1, 1))]
    original.load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 64)
    assert original(x).shape == plain(x).shape
    assert not torch.equal(original(x), plain(x))


def test_fixed_norm_never_moves_its_statistics_but_learns() -> None:
    torch.manual_seed(0)
    norm, x = FixedBatchNorm2d(4), torch.randn(2, 4, 5, 5) * 3 + 1
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for mode in (True, False):
        y = norm.train(mode)(x)
        for c in range(4):
            scale = (norm.running_var[c] + 1e-5).sqrt()
            assert torch.allclose(y[:, c], (x[:, c] - norm.running_mean[c]) / scale, atol=1e-6)
    y.pow(2).sum().backward()
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_sync_norm_is_live_norm_on_a_cpu() -> None:
    torch.manual_seed(0)
    sync, live, x = SyncBatchNorm2d(4), nn.BatchNorm2d(4), torch.randn(2, 4, 5, 5)
    for mode in (True, True, False):
        assert torch.equal(sync.train(mode)(x), live.train(mode)(x))
    assert all(torch.equal(value, live.state_dict()[name]) for name, value in sync.state_dict().items())


@pytest.mark.parametrize(
    ("stages", "trained"), [(0, ""), (3, "layer2 layer3 layer4"), (4, "layer1 layer2 layer3 layer4")]
)
def test_frozen_stages_rest_with_their_statistics(stages: int, trained: str) -> None:
    detector = RetinaNet(["a"], depth=10, width=0.125, neck_channels=32, trainable_stages=stages).train()
    body = detector.net.backbone.body
    assert {n.split(".")[0] for n, p in body.named_parameters() if p.requires_grad} == set(trained.split())
    before = {name: value.clone() for name, value in body.state_dict().items()}
    body(torch.rand(2, 3, 64, 64))
    moved = {name.split(".")[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trained.split())


def test_all_five_stages_train_the_stem() -> None:
    detector = RetinaNet(["a"], depth=10, width=0.125, neck_channels=32, trainable_stages=5)
    assert all(p.requires_grad for p in detector.parameters())
    assert detector.parameters_count == sum(p.numel() for p in detector.net.parameters())


def test_set_eps_reaches_norms_on_running_statistics_only() -> None:
    module = nn.Sequential(FixedBatchNorm2d(2), nn.BatchNorm2d(2), ResNet(10, 0.1, norm="frozen").bn1)
    set_eps(module, 0.0)
    assert [layer.eps for layer in module] == [0.0, 1e-5, 0.0]


BAD = [{"depth": 20}, {"width": 0}, {"width": -1}, {"norm": "batch"}, {"trainable_stages": 6}, {"trainable_stages": -1}]


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(DistillError, match=next(iter(options))):
        FasterRCNN(["a"], **{"depth": 10, "width": 0.1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [((8,),) * 4, ((8,), (8,), (8,), (8,), (8, 9)), ((),) * 5])
def test_anchor_sizes_must_suit_five_levels(sizes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(DistillError, match="anchor_sizes"):
        RetinaNet(["a"], depth=10, width=0.1, anchor_sizes=sizes)


@pytest.mark.parametrize("options", [{"neck_channels": 80}, {"neck_channels": 32}, {"center_sampling_radius": 0}])
def test_what_fcos_cannot_be_built_with_is_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(DistillError, match=next(iter(options))):
        FCOS(["a"], **{"depth": 10, "width": 0.1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [RetinaNet, FCOS])
def test_p6_comes_from_where_it_is_said_even_when_c5_is_as_wide_as_the_neck(family: Any) -> None:
    for source in ("p5", "c5"):
        net = family(["a"], depth=10, width=0.125, neck_channels=64, p6_from=source).net
        body, seen = net.backbone.body(torch.rand(1, 3, 64, 64)), []
        net.backbone.fpn.extra_blocks.p6.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0]))
        maps = net.backbone.fpn(body)
        assert torch.equal(seen[0], maps["2"] if source == "p5" else body["2"])


def attributes(net: nn.Module) -> dict[str, str]:
    """Numbers, names and lists on all modules, and on the matchers, coders and samplers that they hold."""
    found: dict[str, str] = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            helper = hasattr(value, "__dict__") and type(value).__module__.startswith("torchvision.models.detection")
            for inner, each in vars(value).items() if helper else [("", value)]:
                if isinstance(each, (bool, int, float, str, tuple, list, dict)) and "Parameter" not in str(each):
                    found[f"{name}.{key}.{inner}"] = str(each)
    skipped = (".scales.", ".min_size.", "._modules.", "._buffers.", "._is_full_backward_hook.")
    return {name: value for name, value in found.items() if not name.endswith(skipped)}


@pytest.mark.parametrize("which", ["faster_rcnn", "retinanet", "retinanet_v2", "fcos"])
def test_defaults_are_torchvisions_builders(which: str) -> None:
    options = {"weights": None, "weights_backbone": None, "num_classes": 4}
    if which == "faster_rcnn":
        ours, other = FasterRCNN("abc").net, fasterrcnn_resnet50_fpn(**options)
    elif which == "retinanet":
        ours, other = RetinaNet("abc").net, retinanet_resnet50_fpn(**options)
    elif which == "fcos":
        ours, other = FCOS("abc").net, fcos_resnet50_fpn(**options)
    else:
        ours = RetinaNet("abc", p6_from="c5", head_norm="group", box_loss="giou").net
        other = retinanet_resnet50_fpn_v2(**options)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in other.state_dict().items()}
    mine, expected = attributes(ours), attributes(other)
    assert {name: (value, expected[name]) for name, value in mine.items() if value != expected[name]} == {}
    assert mine.keys() == expected.keys()
    assert len(mine) > 100
