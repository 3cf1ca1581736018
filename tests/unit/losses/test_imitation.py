"""The frame of map and region imitation alone: what the counts mean, the hook, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses import masks
from distill.losses.chen import Chen
from distill.losses.dsig import DSIG
from distill.losses.fgfi import FGFI
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.imitation import NORMALIZATIONS, MapImitation, RegionImitation, mask_parts, masked, squared_error
from distill.losses.kernels import blocks
from distill.losses.mimic import Mimic
from distill.losses.tadf import TADF
from distill.types import DistillError
from helpers.fake_view import batch, random_view, spec
from helpers.loss_grid import OBJECTS
from helpers.slow_oracles import slow_masks

NONE = {"kernel": None}
CHANNELS = {8: 5, 16: 5}


def maps(seed: int, channels: int = 5) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        stride: torch.randn(2, channels, 32 // stride, 24 // stride, generator=generator, dtype=torch.float64)
        for stride in CHANNELS
    }


def some_cells() -> dict[int, Tensor]:
    mask = {stride: torch.zeros(2, 32 // stride, 24 // stride) for stride in CHANNELS}
    mask[8][0, 1, 2] = mask[8][1, 3, 0] = mask[16][1, 0, 0] = 1
    mask[8][0, 0, 0] = 0.25
    return mask


@pytest.mark.parametrize("count", list(NORMALIZATIONS))
def test_counts_are_the_mean_its_half_and_half_the_norm_of_a_cell(count: str) -> None:
    student, teacher, mask = maps(1), maps(2), some_cells()
    shares = MapImitation("neck", CHANNELS, CHANNELS, adapter=NONE, normalization=count)(student, teacher, {"on": mask})
    assert list(shares) == ["neck.on"]
    for stride, (total, number) in zip(CHANNELS, shares["neck.on"], strict=True):
        weighed, cells = 0.0, 0.0
        for image in range(2):
            for row in range(32 // stride):
                for column in range(24 // stride):
                    m = mask[stride][image, row, column].item()
                    difference = student[stride][image, :, row, column] - teacher[stride][image, :, row, column]
                    squares = [d**2 for d in difference.tolist()]
                    cell = {"mse": sum(squares) / 5, "half_mse": sum(squares) / 10, "half_l2": sum(squares) / 2}[count]
                    weighed, cells = weighed + m * cell, cells + m
        assert (total / number).item() == pytest.approx(weighed / cells)


@pytest.mark.parametrize("cells", [1, 40, 1000])
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (0, 5, 4, 2)])
def test_the_squared_error_holds_one_map_and_has_the_gradient_of_its_value(
    shape: tuple[int, ...], cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "VALUES", {"cpu": cells})
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        error = squared_error(student.requires_grad_(), teacher.requires_grad_())
    torch.testing.assert_close(error, ((student - teacher) ** 2).sum(1))
    assert [tensor.shape for tensor in kept] == [student.shape]
    assert torch.autograd.gradcheck(lambda x: squared_error(x, teacher), student)
    error.sum().backward()
    assert teacher.grad is None


def test_parts_add_up_to_the_whole() -> None:
    error, mask = squared_error(maps(1)[8], maps(2)[8]), some_cells()
    halves = mask_parts(mask, ["foreground", "background"])
    total = sum(masked(error, part[8], 2)[0].item() for part in halves.values())
    assert total == pytest.approx(error.sum().item())
    assert list(mask_parts(mask, ["background"])) == ["background"]


def test_maps_of_a_level_that_is_left_out_are_not_compared() -> None:
    student, teacher = maps(1), maps(2)
    imitation = MapImitation("neck", CHANNELS, CHANNELS, levels=[16], adapter=NONE)
    del student[8], teacher[8]
    assert imitation.sizes(student) == {16: (2, 1)}
    assert len(imitation(student, teacher, {"on": some_cells()})["neck.on"]) == 1


def test_reweigh_sees_the_bare_feature_and_the_mean_error_of_each_cell() -> None:
    student = {stride: x[:, :3].float() for stride, x in maps(1).items()}
    teacher = {stride: x.float() for stride, x in maps(2).items()}
    imitation = MapImitation("neck", {8: 3, 16: 3}, CHANNELS, normalization="half_mse")
    plain = imitation(student, teacher, {"on": some_cells()})["neck.on"]
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(stride: int) -> object:
        def weigh(feature: Tensor, error: Tensor) -> Tensor:
            seen[stride] = feature, error
            return 3 * error

        return weigh

    imitation.reweigh = {str(stride): hook(stride) for stride in CHANNELS}  # type: ignore[misc]
    weighed = imitation(student, teacher, {"on": some_cells()})["neck.on"]
    for stride, before, after in zip(CHANNELS, plain, weighed, strict=True):
        feature, error = seen[stride]
        assert feature is student[stride]
        adapted = imitation.get_submodule(f"adapters.{stride}")(feature)
        torch.testing.assert_close(error, (adapted - teacher[stride]).square().mean(1))
        torch.testing.assert_close(after[0], 3 * before[0])
        assert torch.equal(after[1], before[1])


def test_regions_are_half_their_mean_squared_error_and_their_number() -> None:
    student, teacher = (torch.randn(4, 5, 7, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    imitation = RegionImitation("regions", 5, 5, NONE)
    total, number = imitation(student, teacher)
    expected = sum((s - t).square().mean().item() / 2 for s, t in zip(student, teacher, strict=True))
    assert total.item() == pytest.approx(expected)
    assert number == 4
    seen: list[Tensor] = []

    def weigh(feature: Tensor, error: Tensor) -> Tensor:
        seen.extend((feature, error))
        return error * torch.tensor([1.0, 0, 0, 0])

    imitation.reweigh = weigh
    assert imitation(student, teacher)[0].item() == pytest.approx((student - teacher)[0].square().mean().item() / 2)
    assert seen[0] is student
    assert seen[1].shape == (4,)


def test_no_region_is_an_attached_zero() -> None:
    student = torch.zeros(0, 3, 7, 7, requires_grad=True)
    imitation = RegionImitation("regions", 3, 5)
    total, number = imitation(student, torch.zeros(0, 5, 7, 7))
    assert total.item() == number.item() == 0
    total.backward()
    assert all(parameter.grad is not None for parameter in imitation.parameters())


def test_another_error_is_taken_for_the_squared_one() -> None:
    imitation = MapImitation(
        "neck", CHANNELS, CHANNELS, adapter=NONE, normalization="mse", error=lambda s, t: (s - t).abs().sum(1)
    )
    ones = {stride: torch.ones_like(x[:, 0]) for stride, x in maps(1).items()}
    total, number = imitation(maps(1), maps(2), {"on": ones})["neck.on"][0]
    assert (total / number).item() == pytest.approx((maps(1)[8] - maps(2)[8]).abs().mean().item())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(DistillError, match="neck: expected a normalization of mse, half_mse, half_l2, got 'mean'"):
        MapImitation("neck", CHANNELS, CHANNELS, normalization="mean")
    with pytest.raises(DistillError, match=r"neck.levels: .* shared are \[8, 16\]"):
        MapImitation("neck", CHANNELS, CHANNELS, levels=[4])
    with pytest.raises(DistillError, match="the student has 5 channels and the teacher 6"):
        MapImitation("neck", CHANNELS, {8: 6, 16: 6}, adapter=NONE)
    with pytest.raises(DistillError, match="adapter: unknown option 'kernal'"):
        RegionImitation("regions", 5, 5, {"kernal": 1})
    with pytest.raises(DistillError, match="the student has 5 channels and the teacher 6"):
        RegionImitation("regions", 5, 6, NONE)


def test_unequal_shapes_name_the_place_and_the_level() -> None:
    short = {**maps(2), 16: maps(2)[16][..., :1, :]}
    with pytest.raises(
        DistillError, match=r"neck, stride 16: .*\(2, 5, 2, 1\).*Leave this stride out with neck.levels"
    ):
        MapImitation("neck", CHANNELS, CHANNELS, adapter=NONE)(maps(1), short, {"on": some_cells()})
    with pytest.raises(DistillError, match=r"regions .*\(3, 5, 7, 7\).*\(2, 5, 7, 7\)"):
        RegionImitation("regions", 5, 5, NONE)(torch.zeros(3, 5, 7, 7), torch.zeros(2, 5, 7, 7))


MIMIC: dict[str, Any] = {"regions": {"all": 0}, "neck": {"all": 1}}
GRAPH = {"nodes": {"foreground": 0, "background": 0}, "edges": {"all": 0}, "logits": {"classes": 0, "boxes": 0}}
HINTS = {"rpn": {"soft": 0, "box": 0}, "rcn": {"soft": 0, "box": 0}}
STYLE = {"head": {"classification": 0, "regression": 0}}
POINTS: dict[str, Any] = {"neck": {"background": 0}, "labels": {"weight": 0}}


@pytest.mark.parametrize("kind", ["ground_truth", "gaussian", "random", "fine_grained"])
@pytest.mark.parametrize(
    ("method", "options", "term", "per_cell", "levels"),
    [
        (Mimic, MIMIC, "neck.all", 2 * 6, 5),
        (DSIG, GRAPH, "neck.all", 6, 1),
        (Chen, HINTS, "hint.neck", 6, 5),
        (TADF, STYLE, "neck.foreground", 2, 5),
    ],
)
def test_any_squared_error_of_maps_takes_any_mask(
    kind: str, method: Any, options: dict[str, Any], term: str, per_cell: int, levels: int
) -> None:
    """`per_cell` is what a level's sum is divided by for each cell of the mask, `levels` what the levels' sum is."""
    known = spec()
    student, teacher = (random_view(batch(OBJECTS), known, seed) for seed in (1, 2))
    loss = method(known, known, **options, mask={"kind": kind}, adapter={"kernel": None})
    sizes = {stride: (x.shape[2], x.shape[3]) for stride, x in student.neck.items()}
    inside = masks.Mask(kind)(student, sizes, loss.seeds(student.batch.ids))
    expected = 0.0
    for stride, mask in inside.items():
        error = (mask * (student.neck[stride] - teacher.neck[stride]).square().sum(1)).sum().item()
        expected += error / max(1.0, per_cell * mask.sum().item()) / levels
    assert loss(student, teacher)[term].item() == pytest.approx(expected, rel=1e-6)


def objects(view: Any, grid: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
    return slow_masks([target.boxes for target in view.batch.targets], grid)


def positives(view: Any, grid: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
    return slow_masks([boxes[names > 0] for boxes, names in zip(view.rois.boxes, view.rois.labels, strict=True)], grid)


@pytest.mark.parametrize("levels", [[8], [16], [8, 32]])
@pytest.mark.parametrize(
    ("method", "options", "place", "part", "per_cell", "cells"),
    [
        (FGFI, {}, "neck", "foreground", 2 * 6, objects),
        (DSIG, GRAPH, "neck", "all", 6, objects),
        (TADF, STYLE, "neck", "foreground", 2, objects),
        (Chen, HINTS, "hint", "neck", 6, objects),
        (GlobalKnowledge, POINTS, "neck", "foreground", 2 * 6, positives),  # without prototypes rho is 1
    ],
)
def test_a_subset_of_levels_is_what_they_are_alone(
    levels: list[int], method: Any, options: dict[str, Any], place: str, part: str, per_cell: int, cells: Any
) -> None:
    """The mean over them, of DSIG the sum; each box lies on one of the chosen levels."""
    known = spec()
    student, teacher = (random_view(batch(OBJECTS), known, seed) for seed in (1, 2))

    def value(chosen: list[int] | None) -> float:
        settings = {**options, place: {**options.get(place, {}), "levels": chosen}, "mask": {"kind": "ground_truth"}}
        return float(method(known, known, **settings, adapter={"kernel": None})(student, teacher)[f"{place}.{part}"])

    of_levels = []
    for stride, inside in cells(student, {s: tuple(student.neck[s].shape[-2:]) for s in levels}).items():
        error = (inside * (student.neck[stride] - teacher.neck[stride]).square().sum(1)).sum().item()
        of_levels.append(error / max(1.0, per_cell * inside.sum().item()))
    assert value(levels) == pytest.approx(sum(of_levels) / (1 if method is DSIG else len(of_levels)), rel=1e-6)
    assert value(levels) != pytest.approx(value(None), rel=0.01)


@pytest.mark.parametrize(
    ("method", "options", "place"),
    [(Mimic, MIMIC, "maps"), (FGFI, {}, "maps"), (DSIG, GRAPH, "maps"), (TADF, STYLE, "neck"), (Chen, HINTS, "hint"),
     (GlobalKnowledge, POINTS, "neck")],
)  # fmt: skip
def test_a_relu_follows_any_adapter(method: Any, options: dict[str, Any], place: str) -> None:
    known = spec()
    student, teacher = (random_view(batch(OBJECTS), known, seed, dtype=torch.float32) for seed in (1, 2))
    with_relu, without = (
        method(known, known, **options, adapter={"kernel": 1, "start": "default", "relu": relu})
        for relu in (True, False)
    )
    for stride, x in student.neck.items():
        convolved = without.get_submodule(f"{place}.adapters.{stride}")(x)
        assert convolved.min() < 0
        assert torch.equal(with_relu.get_submodule(f"{place}.adapters.{stride}")(x), convolved.clamp(min=0))
    values = [next(iter(loss(student, teacher).values())) for loss in (with_relu, without)]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Mimic, {}),
        (DSIG, {"neck": {"all": 0}}),
        (Chen, {"hint": {"neck": 0}}),
        (TADF, {"neck": {"foreground": 0}}),
    ],
)
def test_a_mask_that_nothing_reads_is_refused(method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match=r"mask: it is for (neck|hint), but no term of"):
        method(spec(), spec(), **options, mask={"kind": "ground_truth"})
    method(spec(), spec(), **options)
