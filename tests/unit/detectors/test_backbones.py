"""Our ResNet is torchvision's at width 1, truly narrower below it, and its norms keep their word."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from torchvision.models import resnet
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)

from distill.detectors.backbones import ENDS, ResNet, build_backbone
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.norms import NORMS, FixedBatchNorm2d, SyncBatchNorm2d, set_eps
from distill.detectors.retinanet import RetinaNet
from distill.types import DistillError
from helpers.detectors import nested
from helpers.grids import exhaustive, mostly_exhaustive


def torchvision_network(depth: int) -> nn.Module:
    model = getattr(resnet, f"resnet{depth}")(weights=None)
    del model.avgpool, model.fc
    return model


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_equals_torchvision_at_width_one(depth: int) -> None:
    network, other = ResNet(depth), torchvision_network(depth)
    assert [name for name, _ in network.named_modules()] == [name for name, _ in other.named_modules()]
    assert list(network.state_dict()) == list(other.state_dict())
    other.load_state_dict(network.state_dict(), strict=True)
    x = torch.rand(1, 3, 65, 96)
    expected = x
    for module in other.children():
        expected = module(expected)
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize("depth", [101, 152])
def test_deep_ones_have_torchvisions_shapes(depth: int) -> None:
    with torch.device("meta"):
        network, other = ResNet(depth).state_dict(), torchvision_network(depth).state_dict()
    assert {name: value.shape for name, value in network.items()} == {
        name: value.shape for name, value in other.items()
    }


@pytest.mark.parametrize(
    ("depth", "width", "channels"),
    [(50, 0.25, (64, 128, 256, 512)), (18, 0.5, (32, 64, 128, 256)), (10, 0.1, (6, 13, 26, 51)), (34, 1, None)],
)
def test_width_scales_every_stage(depth: int, width: float, channels: tuple[int, ...] | None) -> None:
    body = ResNet(depth, width)
    channels_seen, x = [], torch.rand(1, 3, 64, 64)
    for name, module in body.named_children():
        x = module(x)
        if name.startswith("layer"):
            channels_seen.append(x.shape[1])
    assert tuple(channels_seen) == body.channels == (channels or (64, 128, 256, 512))
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
    detector = RetinaNet(
        ["a"], backbone={"depth": 10, "width": 0.125, "trainable_stages": stages}, neck_channels=32
    ).train()
    body = detector.net.backbone.body
    assert {n.split(".")[0] for n, p in body.named_parameters() if p.requires_grad} == set(trained.split())
    before = {name: value.clone() for name, value in body.state_dict().items()}
    body(torch.rand(2, 3, 64, 64))
    moved = {name.split(".")[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trained.split())


def test_all_five_stages_train_the_stem() -> None:
    detector = RetinaNet(["a"], backbone={"depth": 10, "width": 0.125, "trainable_stages": 5}, neck_channels=32)
    assert all(p.requires_grad for p in detector.parameters())
    assert detector.parameters_count == sum(p.numel() for p in detector.net.parameters())


def test_set_eps_reaches_norms_on_running_statistics_only() -> None:
    module = nn.Sequential(FixedBatchNorm2d(2), nn.BatchNorm2d(2), ResNet(10, 0.1, norm="frozen").bn1)
    set_eps(module, 0.0)
    assert [layer.eps for layer in module] == [0.0, 1e-5, 0.0]


BAD = [{"depth": 20}, {"width": 0}, {"width": -1}, {"norm": "layer"}, {"trainable_stages": 6}, {"trainable_stages": -1}]


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(DistillError, match=next(iter(options))):
        FasterRCNN(["a"], **nested({"depth": 10, "width": 0.1, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [((8,),) * 4, ((8,), (8,), (8,), (8,), (8, 9)), ((),) * 5])
def test_anchor_sizes_must_suit_five_levels(sizes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(DistillError, match=r"anchors\.sizes"):
        RetinaNet(["a"], backbone={"depth": 10, "width": 0.1}, anchors={"sizes": sizes})


@pytest.mark.parametrize("options", [{"neck_channels": 80}, {"neck_channels": 32}, {"center_sampling_radius": 0}])
def test_what_fcos_cannot_be_built_with_is_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(DistillError, match=next(iter(options))):
        FCOS(["a"], **nested({"depth": 10, "width": 0.1, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [RetinaNet, FCOS])
def test_p6_comes_from_where_it_is_said_even_when_c5_is_as_wide_as_the_neck(family: Any) -> None:
    for source in ("p5", "c5"):
        net = family(["a"], backbone={"depth": 10, "width": 0.125}, neck_channels=64, p6_from=source).net
        body, seen = net.backbone.body(torch.rand(1, 3, 64, 64)), []
        net.backbone.fpn.extra_blocks.p6.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0]))
        maps = net.backbone.fpn(body)
        assert torch.equal(seen[0], maps["2"] if source == "p5" else body["2"])


def attributes(net: nn.Module) -> dict[str, str]:
    """Numbers, names and lists on all modules, and on the matchers, coders and samplers that they hold."""
    values: dict[str, str] = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            helper = hasattr(value, "__dict__") and type(value).__module__.startswith("torchvision.models.detection")
            for inner, member in vars(value).items() if helper else [("", value)]:
                if isinstance(member, (bool, int, float, str, tuple, list, dict)) and "Parameter" not in str(member):
                    values[f"{name}.{key}.{inner}"] = str(member)
    skipped = (".ends.", ".scales.", "transform.min_size.", "._modules.", "._buffers.", "._is_full_backward_hook.")
    return {name: value for name, value in values.items() if not name.endswith(skipped)}


@pytest.mark.parametrize("which", ["faster_rcnn", exhaustive("retinanet"), "retinanet_v2", exhaustive("fcos")])
def test_defaults_are_torchvisions_builders(which: str) -> None:
    options = {"weights": None, "weights_backbone": None, "num_classes": 4}
    if which == "faster_rcnn":
        # The default's pool is our own, which has attributes more: see test_roi_align.py.
        network, other = FasterRCNN("abc", box_roi_align="torchvision").net, fasterrcnn_resnet50_fpn(**options)
    elif which == "retinanet":
        network, other = RetinaNet("abc").net, retinanet_resnet50_fpn(**options)
    elif which == "fcos":
        network, other = FCOS("abc").net, fcos_resnet50_fpn(**options)
    else:
        network = RetinaNet("abc", p6_from="c5", head_norm="group", box_loss="giou").net
        other = retinanet_resnet50_fpn_v2(**options)
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in other.state_dict().items()}
    actual, expected = attributes(network), attributes(other)
    assert {name: (value, expected[name]) for name, value in actual.items() if value != expected[name]} == {}
    assert actual.keys() == expected.keys()
    assert len(actual) > 100


# -- bodies other than the ResNet


@pytest.mark.parametrize("backbone", mostly_exhaustive(ENDS, list(ENDS)[::4]))
def test_a_body_has_torchvisions_keys_and_shapes_at_strides_4_to_32(backbone: str) -> None:
    with torch.device("meta"):
        network = models.get_model(backbone, weights=None)
        body: Any = build_backbone(backbone)
        x, strides = torch.rand(1, 3, 64, 64), {}
        for name, part in body.named_children():
            x = part(x)
            strides[name] = (64 // x.shape[-1], x.shape[1])
    tensors = getattr(network, "features", network).state_dict()
    body_tensors = body.state_dict()
    left = {name.split(".")[0] for name in tensors.keys() - body_tensors.keys()}
    assert left == ({str(len(network.features) - 1)} if hasattr(network, "features") else {"fc"})
    assert {name: tensors[name].shape for name in body_tensors} == {
        name: value.shape for name, value in body_tensors.items()
    }
    last = {stride: name for name, (stride, _) in strides.items()}  # the last child at each stride
    assert [last[stride] for stride in (4, 8, 16, 32)] == list(body.ends[1:])
    assert [strides[end][1] for end in body.ends[1:]] == list(body.channels)
    assert strides[body.ends[0]][0] == 2


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnext50_32x4d"])
@pytest.mark.parametrize("stages", mostly_exhaustive(range(6), [0, 3]))
def test_every_body_frees_its_stages_from_behind(backbone: str, stages: int) -> None:
    detector = RetinaNet(["a"], backbone={"name": backbone, "trainable_stages": stages}, neck_channels=32).train()
    body, seen = detector.net.backbone.body, {}
    x = torch.rand(2, 3, 64, 64)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    with torch.no_grad():
        for name, part in body.items():
            x = part(x)
            seen[name] = 64 // x.shape[-1]
    coarse = {name for name, stride in seen.items() if stride >= (2, 4, 8, 16, 32, 64)[5 - stages]}
    if backbone.startswith("resnext"):
        coarse -= {"maxpool"} | ({"conv1", "bn1"} if stages < 5 else set())
    trained = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == coarse - {"relu", "maxpool"}
    moved = {name.split(".")[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained - {"conv1"}


def norms_of(body: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in body.named_modules() if hasattr(module, "running_var")}


@pytest.mark.parametrize(("backbone", "eps"), [("mobilenet_v2", 1e-5), ("mobilenet_v3_large", 1e-3)])
@pytest.mark.parametrize("norm", list(NORMS))
def test_every_norm_suits_every_body(backbone: str, eps: float, norm: str) -> None:
    torch.manual_seed(0)
    x, live = torch.rand(2, 3, 64, 64), build_backbone(backbone)
    for module in norms_of(live).values():
        module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[operator, union-attr]
        module.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    body = build_backbone(backbone, norm=norm)
    body.load_state_dict(live.state_dict(), strict=norm != "frozen")
    assert norms_of(body).keys() == norms_of(live).keys()
    assert {type(module) for module in norms_of(body).values()} == {NORMS[norm]}
    assert {module.eps for module in norms_of(body).values()} == {eps}
    assert torch.allclose(body.eval()(x), live.eval()(x), atol=1e-5)
    trained = any(p.requires_grad for module in norms_of(body).values() for p in module.parameters())
    before = {name: module.running_var.clone() for name, module in norms_of(body).items()}  # type: ignore[operator]
    body.train()(x)
    moved = {name for name, module in norms_of(body).items() if not torch.equal(module.running_var, before[name])}  # type: ignore[arg-type]
    assert (trained, moved) == (norm != "frozen", before.keys() if norm in ("batch", "sync") else set())
    assert {module.eps for module in norms_of(build_backbone(backbone, norm=norm, norm_eps=0.02)).values()} == {0.02}


def test_mobilenets_come_in_torchvisions_widths() -> None:
    for backbone in ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"):
        tensors = models.get_model(backbone, weights=None, width_mult=0.5).features.state_dict()
        body_tensors = build_backbone(backbone, width=0.5).state_dict()
        assert len(body_tensors) > 100
        assert {name: value.shape for name, value in body_tensors.items()} == {
            name: tensors[name].shape for name in body_tensors
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"backbone": "mobilenet"},
            r"backbone\.name: expected resnet, timm/NAME, or one of .*mobilenet_v2.*, got 'mobilenet'",
        ),
        ({"backbone": "mobilenet_v2", "depth": 18}, "depth"),
        ({"backbone": "resnext50_32x4d", "stride_in_1x1": True}, "stride_in_1x1"),
        ({"backbone": "efficientnet_b0", "width": 0.5}, "width: expected 1 for efficientnet_b0"),
        ({"backbone": "resnext50_32x4d", "width": 0.5}, "width: expected 1 for resnext50_32x4d"),
        ({"backbone": "mobilenet_v2", "width": 0}, "width"),
        ({"backbone": "mobilenet_v2", "norm": "layer"}, "norm"),
    ],
)
def test_an_option_that_a_backbone_lacks_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DistillError, match=words):
        FasterRCNN(["a"], **nested(options))


def test_what_was_left_open_is_told() -> None:
    for options, expected in (
        ({}, (50, 1e-5)),
        ({"depth": 18}, (18, 1e-5)),
        ({"backbone": "mobilenet_v3_large"}, (None, 1e-3)),
        ({"backbone": "efficientnet_b0", "norm": "frozen"}, (None, 1e-5)),
    ):
        described = RetinaNet(["a"], neck_channels=32, **nested(options)).describe()  # type: ignore[arg-type]
        assert (described["backbone"]["depth"], described["backbone"]["norm_eps"]) == expected


# -- timm


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DistillError, match=r"install 'distill\[timm\]'"):
        RetinaNet(["a"], backbone={"name": "timm/resnet18"})


TIMM = [  # channels of C2..C5 as the papers have them; MobileNetV3-Small's 16, 24, 48, 576 halved, in multiples of 8
    ("resnet18", (64, 128, 256, 512)),
    ("mobilenetv3_small_050", (8, 16, 24, 288)),
    ("regnetx_002", (24, 56, 152, 368)),
]


@pytest.mark.parametrize(("name", "channels"), TIMM)
@pytest.mark.parametrize("norm", list(NORMS))
def test_a_timm_body_keeps_the_protocol(name: str, channels: tuple[int, ...], norm: str) -> None:
    detector = RetinaNet(
        ["a"], backbone={"name": f"timm/{name}", "norm": norm, "trainable_stages": 2}, neck_channels=32
    )
    body, x = detector.net.backbone.body, torch.rand(2, 3, 64, 64)
    features = timm.create_model(name, features_only=True)
    state = {key.removeprefix("net."): value for key, value in body.state_dict().items()}
    features.load_state_dict(state, strict=norm != "frozen")
    assert tuple(detector.spec.body.values()) == channels
    for map_, other in zip(body.eval().maps(x), features.eval()(x)[-4:], strict=True):
        assert torch.allclose(map_, other, atol=1e-4)
    norms = norms_of(body).values()
    assert len(norms) == len(norms_of(features))
    assert all(isinstance(module, NORMS[norm]) for module in norms)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, _ in TIMM])
def test_a_timm_body_frees_its_stages_from_behind(name: str) -> None:
    detector = RetinaNet(["a"], backbone={"name": f"timm/{name}", "trainable_stages": 2}, neck_channels=32).train()
    body, x = detector.net.backbone.body, torch.rand(2, 3, 64, 64)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    maps = body.maps(x)
    assert [module.requires_grad for module in maps] == [False, False, True, True]
    moved = {key.rsplit(".", 1)[0] for key, value in body.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, module in norms_of(body).items() if module.weight.requires_grad}  # type: ignore[union-attr]
    maps = body.eval().maps(x)
    for p in body.parameters():
        p.data += p.requires_grad
    assert [torch.equal(a, b) for a, b in zip(maps, body.maps(x), strict=True)] == [True, True, False, False]


def test_a_timm_network_of_other_strides_or_norms_is_refused() -> None:
    for options, words in (
        ({"backbone": "timm/no_such_net"}, "list_models"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "strides 4, 8, 16, 32"),
        ({"backbone": "timm/swin_tiny_patch4_window7_224"}, "timm/swin_tiny_patch4_window7_224"),
        ({"backbone": "timm/convnext_atto", "norm": "frozen"}, "no batch norm"),
        ({"backbone": "timm/resnet18", "width": 0.5}, "width"),
    ):
        with pytest.raises(DistillError, match=words):
            RetinaNet(["a"], neck_channels=32, **nested(options))  # type: ignore[arg-type]
    assert (
        RetinaNet(["a"], backbone={"name": "timm/convnext_atto"}, neck_channels=32).describe()["backbone"]["norm_eps"]
        is None
    )
