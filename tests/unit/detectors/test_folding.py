"""A folded teacher gives the maps of the plain one, on weights far from their start; what cannot be folded stays."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from distill.cli.config import override_checks
from distill.cli.runs.preflight import plan_teacher
from distill.cli.runs.teacher_cache import TeacherOptions, as_teacher
from distill.detectors.faster_rcnn import FasterRCNN
from distill.detectors.fcos import FCOS
from distill.detectors.folding import fold
from distill.detectors.inherit import inherit
from distill.detectors.norms import FixedBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNorm2d
from distill.detectors.retinanet import RetinaNet
from distill.frozen import state_fingerprint
from distill.teacher import Teacher
from distill.types import Batch, DistillError, Target

CPU = torch.device("cpu")


def lived(module: nn.Module) -> Any:
    """The module with statistics, scales and shifts as training would leave them."""
    draw = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if getattr(layer, "running_var", None) is not None:
            layer.running_mean.normal_(0, 0.2, generator=draw)
            layer.running_var.uniform_(0.2, 3, generator=draw)
            if layer.weight is not None:
                layer.weight.data.uniform_(-1, 1.5, generator=draw)
                layer.bias.data.normal_(0, 0.2, generator=draw)
    return module.eval().requires_grad_(False)


def images(batch: int = 2, height: int = 64, width: int = 96) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=draw)


def batch() -> Batch:
    target = Target(torch.tensor([[5.0, 6.0, 40.0, 50.0]]), torch.tensor([1]))
    return Batch(images(), ((64, 96), (60, 90)), ((64, 96), (60, 90)), (target,) * 2, (1, 2))


class Net(nn.Module):
    """A convolution, a norm, a ReLU."""

    def __init__(self, norm: nn.Module, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def folded(net: nn.Module, x: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many norms were folded, and the output before and after."""
    before = net(x)
    count = fold(net, lambda: {1: net(x)})
    return count, before, net(x)


def pictures(dtype: torch.dtype = torch.float64) -> Tensor:
    return images().to(dtype) / 255 - 0.4


NORMS: dict[str, Callable[[float], nn.Module]] = {
    "frozen": lambda eps: FrozenBatchNorm2d(8, eps=eps),
    "fixed": lambda eps: FixedBatchNorm2d(8, eps=eps),
    "live": lambda eps: nn.BatchNorm2d(8, eps=eps),
    "not affine": lambda eps: nn.BatchNorm2d(8, eps=eps, affine=False),
    "sync": lambda eps: SyncBatchNorm2d(8, eps=eps),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("norm", NORMS)
def test_a_folded_norm_gives_what_the_equation_says(norm: str, eps: float, bias: bool) -> None:
    net = lived(Net(NORMS[norm](eps), nn.Conv2d(3, 8, 3, padding=1, bias=bias))).double()
    layer: Any = net.norm
    x = pictures()
    raw = F.conv2d(x, net.conv.weight, net.conv.bias, padding=1)  # type: ignore[union-attr, arg-type]
    expected = torch.empty_like(raw)
    for c in range(8):
        scale = (1.0 if layer.weight is None else layer.weight[c].item()) / math.sqrt(layer.running_var[c].item() + eps)
        shift = 0.0 if layer.bias is None else layer.bias[c].item()
        expected[:, c] = ((raw[:, c] - layer.running_mean[c].item()) * scale + shift).clamp(min=0)
    count, before, after = folded(net, x)
    assert count == 1
    assert isinstance(net.norm, nn.Identity)
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 12, 3, groups=3), nn.Conv2d(3, 12, 1, dilation=2, padding_mode="reflect")]
)
def test_groups_and_dilations_are_folded(conv: nn.Module) -> None:
    count, before, after = folded(lived(Net(nn.BatchNorm2d(12), conv)).double(), pictures())
    assert count == 1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


def test_an_activation_inside_a_norm_stays() -> None:
    norm = FrozenBatchNormAct2d(8)
    norm.drop, norm.act = nn.Identity(), nn.Hardswish()
    count, before, after = folded(lived(Net(norm)).double(), pictures())
    assert count == 1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


class Twice(Net):
    """The convolution's output is read by another as well."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return F.relu(self.norm(out)) + out


class Written(Net):
    """Something is written into the convolution's output before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x), inplace=True))


class Bare(Net):
    """The convolution is used a second time, without the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


class Between(Net):
    """The norm is used a second time, on something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias)


def infinite() -> nn.Module:
    net = lived(Net(FrozenBatchNorm2d(8, eps=0.0)))
    net.norm.running_var[2] = 0.0
    return net


LEFT: dict[str, Callable[[], nn.Module]] = {
    "read twice": lambda: lived(Twice(nn.BatchNorm2d(8))),
    "written": lambda: lived(Written(nn.BatchNorm2d(8))),
    "bare": lambda: lived(Bare(nn.BatchNorm2d(8))),
    "between": lambda: lived(Between(nn.BatchNorm2d(8))),
    "group norm": lambda: Net(nn.GroupNorm(2, 8)).eval(),
    "standardised": lambda: lived(Net(nn.BatchNorm2d(8), Standardised(3, 8, 3))),
    "without statistics": lambda: Net(nn.BatchNorm2d(8, track_running_stats=False)).eval(),
    "in training": lambda: lived(Net(nn.BatchNorm2d(8))).train(),
    "variance 0": infinite,
    "parametrised": lambda: lived(
        Net(nn.BatchNorm2d(8), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))  # type: ignore[no-untyped-call]
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_stays_as_it_is(name: str) -> None:
    net = LEFT[name]()
    state, parts = copy.deepcopy(net.state_dict()), [type(part) for part in net.modules()]
    count, before, after = folded(net, pictures(torch.float32))
    assert count == 0
    assert [type(part) for part in net.modules()] == parts
    if name != "in training":  # whose statistics each forward pass moves
        assert torch.equal(before.nan_to_num(), after.nan_to_num())
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


# -- the teacher


DETECTORS: dict[str, Callable[[], Any]] = {
    "resnet, frozen": lambda: FasterRCNN(
        ["a"], backbone={"depth": 50, "width": 0.25, "norm": "frozen"}, neck_channels=32, head_channels=16
    ),
    "resnet, eps 0": lambda: FasterRCNN(
        ["a"],
        backbone={"depth": 18, "width": 0.25, "norm": "frozen", "norm_eps": 0.0},
        neck_channels=32,
        head_channels=16,
    ),
    "resnet, live": lambda: RetinaNet(["a"], backbone={"depth": 18, "width": 0.25, "norm": "batch"}, neck_channels=32),
    "mobilenet, live": lambda: FCOS(["a"], backbone={"name": "mobilenet_v2", "width": 0.5}, neck_channels=64),
    "efficientnet, fixed": lambda: RetinaNet(
        ["a"], backbone={"name": "efficientnet_b0", "norm": "batch_fixed_stats"}, neck_channels=32
    ),
}


def norms(detector: nn.Module) -> int:
    return sum(getattr(layer, "running_var", None) is not None for layer in detector.modules())


def off(detector: Any, **options: Any) -> Teacher:
    return Teacher(detector, **{"fold": False, "channels_last": False} | options)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_cheap_teacher_gives_the_maps_of_the_plain_one(name: str, double: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    detector = lived(DETECTORS[name]())
    detector = detector.double() if double else detector
    teacher = Teacher(detector, channels_last=channels_last)
    assert norms(teacher.optimized(CPU)) == 0 < norms(detector)
    plain, cheap = detector.view(batch(), training=False, frozen=True), teacher.view(batch(), training=False)
    for stage in ("body", "neck", "deltas"):
        for stride, maps in getattr(plain, stage).items():
            error = (getattr(cheap, stage)[stride] - maps).abs().max() / maps.abs().max()
            assert error < (1e-10 if double else 1e-5), (stage, stride)


def test_a_guest_without_options_is_the_detector_itself() -> None:
    detector = lived(DETECTORS["resnet, live"]())
    assert off(detector).optimized(CPU) is detector


def test_group_norm_in_the_heads_is_untouched() -> None:
    working = Teacher(lived(DETECTORS["mobilenet, live"]())).optimized(CPU)
    assert any(isinstance(layer, nn.GroupNorm) for layer in working.modules())


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"fold": False}], ids=str)
def test_the_detector_stays_what_it_was(options: dict[str, Any]) -> None:
    detector = lived(DETECTORS["resnet, frozen"]())
    before = {name: (value.clone(), value.stride()) for name, value in detector.state_dict().items()}
    digest, described = state_fingerprint(detector.state_dict), detector.describe()
    teacher = Teacher(detector, **options)
    detections = teacher.view(batch(), training=False).detections
    assert len(detections) == 2
    assert teacher.fingerprint == digest == teacher.identity()["sha256"]
    assert detector.describe() == described
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]
        assert value.dtype == before[name][0].dtype
    student = FasterRCNN(["a"], backbone={"depth": 18, "width": 0.25}, neck_channels=32, head_channels=16)
    inherit(student, teacher.detector)
    student_state, teacher_state = student.net.backbone.fpn.state_dict(), detector.net.backbone.fpn.state_dict()
    same = [name for name in student_state if name.startswith("layer_blocks")]
    assert same
    assert all(torch.equal(student_state[name], teacher_state[name]) for name in same)


def test_unchanged_weights_are_shared_and_nothing_is_trained() -> None:
    detector = lived(DETECTORS["resnet, frozen"]())
    working = Teacher(detector).optimized(CPU)
    assert not any(parameter.requires_grad for parameter in working.parameters())
    assert not any(module.training for module in working.modules())
    addresses = {parameter.data_ptr() for parameter in detector.parameters()}
    assert working.net.roi_heads.box_head.fc6.weight.data_ptr() in addresses
    assert working.net.backbone.body.conv1.weight.data_ptr() not in addresses


def test_the_cheap_network_is_made_once_and_copied_never() -> None:
    teacher = Teacher(lived(DETECTORS["resnet, live"]()))
    first = teacher.optimized(CPU)
    assert teacher.optimized(CPU) is first
    assert copy.deepcopy(teacher) is teacher


def test_making_it_draws_nothing() -> None:
    detector = lived(DETECTORS["resnet, live"]())
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    _ = Teacher(detector).view(batch()).neck
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_is_what_was_asked_for() -> None:
    detector = lived(DETECTORS["resnet, frozen"]())
    view = Teacher(detector, dtype="bfloat16").view(batch(), training=False)
    plain = off(detector).view(batch(), training=False)
    for stride, maps in plain.neck.items():
        assert view.neck[stride].dtype == torch.bfloat16
        assert (view.neck[stride].float() - maps).abs().max() < 0.05 * maps.abs().max()
    assert all(image.boxes.dtype == torch.float32 for image in view.detections)


def test_auto_leaves_a_teacher_on_the_cpu_as_it_is_under_autocast() -> None:
    detector = lived(DETECTORS["resnet, frozen"]())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Teacher(detector).optimized(CPU).net.backbone.body.conv1.weight.dtype == torch.float32


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DistillError, match="expected one of auto, float32, bfloat16, got 'half'"):
        Teacher(lived(DETECTORS["resnet, frozen"]()), dtype="half")


def test_the_command_line_passes_its_keys_on_and_has_the_same_defaults() -> None:
    detector = lived(DETECTORS["resnet, frozen"]())

    def options(*lines: str) -> TeacherOptions:
        planned = plan_teacher(override_checks.compose_without_run(["teacher=frcnn_r18", *lines]))
        assert planned is not None
        return planned

    plain = options()
    defaults = {name: parameter.default for name, parameter in inspect.signature(Teacher).parameters.items()}
    for name in ("fold", "channels_last", "dtype"):
        assert plain.optimization[name] == defaults[name] == getattr(as_teacher(plain, detector, "x"), name)
    lines = ["teacher.fold=false", "teacher.channels_last=false", "teacher.dtype=bfloat16"]
    made = as_teacher(options(*lines), detector, "x", {"val/AP": 0.5})
    assert (made.fold, made.channels_last, made.dtype) == (False, False, "bfloat16")
    assert (made.source, made.values) == ("x", {"val/AP": 0.5})
