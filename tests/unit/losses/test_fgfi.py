"""FGFI: both normalisations by hand, slow oracles with masks by anchors, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cli.config import compose, instantiate
from distill.losses.base import DistillLoss
from distill.losses.fgfi import FGFI
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import STRIDES, FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, AnchorsFollowMaps
from helpers.slow_oracles import slow_fine_grained

NONE = {"kernel": None}


def slow_cells(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[float, int]:
    """Sum of the squared distances of the cells that are on, and their number."""
    total, on = 0.0, 0
    for image, row, column in mask.nonzero().tolist():
        s, t = student[image, :, row, column].tolist(), teacher[image, :, row, column].tolist()
        total, on = total + sum((a - b) ** 2 for a, b in zip(s, t, strict=True)), on + 1
    return total, on


def slow_fgfi(student: FakeView, teacher: FakeView, per_cell: float, psi: float = 0.5) -> float:
    """Mean over levels of the squared distances over max(1, `per_cell` times the cells)."""
    boxes = [target.boxes for target in student.batch.targets]
    grid = {stride: (x.shape[2], x.shape[3]) for stride, x in student.neck.items()}
    masks = slow_fine_grained(boxes, student.anchors, grid, psi)
    levels = [slow_cells(student.neck[s], teacher.neck[s], masks[s]) for s in grid]
    return sum(total / max(1.0, per_cell * on) for total, on in levels) / len(levels)


class TestFGFI(AnchorsFollowMaps):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return FGFI(student, teacher, adapter=NONE)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return FGFI(student, teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        return {"neck.foreground": slow_fgfi(student, teacher, per_cell=2 * 6)}


class TestFGFIOriginal(TestFGFI):
    student = teacher = spec(two_stage=False, strides=(8, 16, 32, 64, 128), anchors=2)

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return FGFI(student, teacher, normalization="half_l2", adapter=NONE)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        # From the released start values a few cells in a hundred have a gradient through the ReLU: none needs to.
        return FGFI(student, teacher, normalization="half_l2", adapter={"start": "default", "relu": True})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        return {"neck.foreground": slow_fgfi(student, teacher, per_cell=2)}


def pair(**options: Any) -> tuple[FakeView, FakeView]:
    options = {"dtype": torch.float64, **options}
    return random_view(batch(OBJECTS), spec(), 1, **options), random_view(batch(OBJECTS), spec(), 2, **options)


def test_the_original_is_half_the_squared_distance_of_the_cells_that_are_on() -> None:
    """One map, one box, one anchor a cell: which cells are on is told by hand."""
    known = spec(strides=(16,), neck=2, anchors=1)
    images = batch([[[0.0, 0.0, 32.0, 16.0]]], 32, 64)
    cells = torch.tensor(
        [[16.0 * x, 16.0 * y, 16.0 * x + 16, 16.0 * y + 16] for y in range(2) for x in range(4)]
    )  # the cells themselves: two lie inside the box with IoU 1/2, the others outside
    student = FakeView(images, known, neck={16: torch.zeros(1, 2, 2, 4)}, anchors={16: cells})
    teacher = FakeView(images, known, neck={16: torch.full((1, 2, 2, 4), 100.0)}, anchors={16: cells})
    teacher.neck[16][0, :, 0, 0] = torch.tensor([3.0, 4.0])
    teacher.neck[16][0, :, 0, 1] = torch.tensor([1.0, 0.0])
    for normalization, expected in (("half_l2", (25 + 1) / 4), ("half_mse", (25 + 1) / 8), ("mse", (25 + 1) / 4)):
        value = FGFI(known, known, normalization=normalization, adapter=NONE)(student, teacher)["neck.foreground"]
        assert value.item() == pytest.approx(expected)


def test_weights_of_both_forms_agree_up_to_the_channels() -> None:
    original, rerun = (FGFI(spec(), spec(), normalization=name, adapter=NONE) for name in ("half_l2", "half_mse"))
    student, teacher = pair()
    single = [loss(student, teacher)["neck.foreground"].item() for loss in (original, rerun)]
    assert single[0] == pytest.approx(6 * single[1])


@pytest.mark.parametrize("psi", [0.0, 0.8])
def test_psi_is_the_threshold(psi: float) -> None:
    student, teacher = pair()
    loss = FGFI(spec(), spec(), mask={"threshold": psi}, adapter=NONE)
    assert loss(student, teacher)["neck.foreground"].item() == pytest.approx(slow_fgfi(student, teacher, 12, psi))


@pytest.mark.parametrize("kind", ["ground_truth", "gaussian", "random", "none", "fine_grained_all_levels"])
def test_any_mask_will_do(kind: str) -> None:
    student, teacher = pair()
    loss = FGFI(spec(), spec(), mask={"kind": kind}, adapter=NONE)
    value = loss(student, teacher)["neck.foreground"].item()
    sizes = {s: (64 // s, 64 // s) for s in STRIDES}
    masks = loss.mask(student, sizes, loss.seeds(student.batch.ids))
    levels = []
    for s in STRIDES:
        error = (student.neck[s] - teacher.neck[s]).square().sum(1)
        levels.append((masks[s] * error).sum().item() / max(1, 12 * masks[s].sum().item()))
    assert value == pytest.approx(sum(levels) / 5)
    assert value != pytest.approx(slow_fgfi(student, teacher, 12))


def test_nothing_but_the_neck_and_anchors_is_read() -> None:
    student, teacher = pair(dtype=torch.float32)
    FGFI(spec(), spec())(student, teacher)
    assert teacher.reads == {"neck"}
    assert student.reads == {"neck", "anchors"}
    nothing = FGFI(spec(), spec(), neck={"foreground": 0})
    assert nothing(student, teacher) == {}
    assert not list(nothing.parameters())


def test_falls_when_it_alone_is_minimised() -> None:
    student, teacher = pair(dtype=torch.float32)
    loss = FGFI(spec(), spec(), adapter={"start": "default"})
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    values = []
    for _ in range(30):
        value = loss(student, teacher)["neck.foreground"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": {"background": 1}}, "neck: unknown option 'background'"),
        ({"neck": {"foreground": "much"}}, "FGFI: expected weights"),
        ({"neck": {"levels": [128]}}, "neck.levels: expected strides that both models have"),
        ({"mask": {"kind": "anchors"}}, "mask.kind: expected one of"),
        ({"mask": {"threshold": 1.0}}, "mask.threshold"),
        ({"normalization": "l2"}, "expected a normalization of mse, half_mse, half_l2, got 'l2'"),
        ({"adapter": {"kernel": 5}}, "adapter"),
        ({"adapter": {"reluu": True}}, "did you mean 'relu'"),
        ({"ramp": {"warm": 1}}, "did you mean 'warmup'"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        FGFI(spec(), spec(), **options)


def built(*options: str) -> dict[str, Any]:
    losses = compose.compose_config([f"distill=[{','.join(options)}]"]).distill.losses
    return {str(name): instantiate.build_node(node, student=spec(), teacher=spec()) for name, node in losses.items()}


def test_options_say_the_weights_and_forms_of_their_sources() -> None:
    assert built("fgfi")["fgfi"].weights == {"neck.foreground": 4}
    assert built("fgfi_voc")["fgfi"].weights == {"neck.foreground": 3}
    original = built("fgfi_original")["fgfi"]
    assert original.weights == {"neck.foreground": 0.01}
    assert original.maps.divisor(256) == 2
    convolution, relu = original.maps.adapters["4"]
    assert not convolution.bias.any()
    assert isinstance(relu, torch.nn.ReLU)
    assert original.ramp(0.0, 12) == 0 < original.ramp(0.1, 12) < original.ramp(0.2, 12) == 1


def test_adds_up_with_defeat() -> None:
    losses = built("defeat", "fgfi")
    student, teacher = pair(dtype=torch.float32)
    assert {name: list(loss(student, teacher)) for name, loss in losses.items()} == {
        "defeat": ["neck.foreground", "neck.background"],
        "fgfi": ["neck.foreground"],
    }
