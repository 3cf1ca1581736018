"""DeFeat: golden values of the reference code, slow oracles, and each promise of its options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.losses import base, defeat, heads, imitation, masks
from distill.losses.base import DistillLoss
from distill.losses.defeat import DeFeat
from distill.types import DetectorSpec, DistillError, Target
from helpers.fake_view import STRIDES, FakeView, batch, equal_views, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.slow_oracles import slow_masks
from helpers.two_processes import run_in_two_processes

NO_ADAPTER = {"kernel": None, "backbone_relu": False}
ALL_ON: dict[str, Mapping[str, Any]] = {
    "neck": {"foreground": 4, "background": 16},
    "backbone": {"foreground": 1, "background": 2},
    "proposals": {"positive": 0.05, "negative": 2, "all": 1, "temperature_all": 2},
}
OFF: dict[str, Mapping[str, Any]] = {"neck": {"foreground": 0, "background": 0}}


def ramp(shape: tuple[int, ...], k: float, o: float, a: float) -> Tensor:
    return a * torch.sin(k * torch.arange(math.prod(shape), dtype=torch.float64) + o).reshape(shape)


# -- the reference code's values


def level_zero_mask() -> Tensor:
    mask = torch.zeros(2, 8, 8)
    mask[0, 2:5, 1:4] = 1
    mask[1, 0, 7] = 1
    return mask


def mean_over(shares: list[base.SumAndCount]) -> float:
    return sum((total / count.clamp(min=1)).item() for total, count in shares) / len(shares)


def test_golden_neck() -> None:
    middle = torch.zeros(2, 4, 4)
    middle[1, 1:3] = 1
    shares: list[tuple[base.SumAndCount, base.SumAndCount]] = []
    for level, (size, mask) in enumerate(
        zip((8, 4, 2), (level_zero_mask(), middle, torch.zeros(2, 2, 2)), strict=True)
    ):
        shape = (2, 3, size, size)
        error = imitation.squared_error(ramp(shape, 0.1, level, 1), ramp(shape, 0.07, 0.5 + level, 1))
        shares.append((imitation.masked(error, mask, 2 * 3), imitation.masked(error, 1 - mask, 2 * 3)))
    assert mean_over([share[0] for share in shares]) == pytest.approx(0.341675496, rel=1e-6)
    assert mean_over([share[1] for share in shares]) == pytest.approx(0.2498760389, rel=1e-6)


def golden_stages(scale: float, offset: float) -> dict[int, Tensor]:
    shapes = zip((4, 8, 16, 32), (2, 3, 4, 5), (8, 4, 2, 1), strict=True)
    return {stride: ramp((2, c, h, h), scale, c + offset, 1) for stride, c, h in shapes}


def test_golden_backbone_through_the_whole_loss() -> None:
    # Boxes at stride 4 whose cells are the reference mask's: rows 2..4, columns 1..3, and the cell (0, 7).
    images = batch([[[4.0, 8.0, 16.0, 20.0]], [[28.0, 0.0, 32.0, 4.0]]], 32, 32)
    known = spec(body=(2, 3, 4, 5), strides=(4, 8))
    neck = {4: torch.zeros(2, 6, 8, 8), 8: torch.zeros(2, 6, 4, 4)}
    student = FakeView(images, known, body=golden_stages(0.05, 0), neck=neck)
    teacher = FakeView(images, known, body=golden_stages(0.09, 0.3), neck=neck)
    values = DeFeat(known, known, **OFF, backbone={"foreground": 1, "background": 1}, adapter=NO_ADAPTER)(
        student, teacher
    )
    assert values["backbone.foreground"].item() == pytest.approx(0.1348354761, rel=1e-6)
    assert values["backbone.background"].item() == pytest.approx(0.3459915515, rel=1e-6)
    assert teacher.reads == {"body"}


@pytest.mark.parametrize(
    ("temperature", "positive", "negative", "every"),
    [
        (1, 0.0735282553, 0.1211350382, 0.1052661106),
        (2, 0.0792672346, 0.1267033869, 0.1108913361),
        (3, 0.0808625334, 0.1276636304, 0.1120632648),
    ],
)
def test_golden_divergence(temperature: float, positive: float, negative: float, every: float) -> None:
    value = heads.kl_divergence(ramp((6, 5), 0.3, 0, 2), ramp((6, 5), 0.2, 1, 2), temperature)
    # The reference's background is its last label, 4; ours is 0.
    members = defeat.groups([torch.tensor([1, 4, 0]), torch.tensor([0, 0, 0])])
    means = [(value[members[group]].mean().item()) for group in ("positive", "negative", "all")]
    assert means == pytest.approx([positive, negative, every], rel=1e-6)


# -- the shared grid


def slow_kl(student: list[float], teacher: list[float], temperature: float) -> float:
    p, q = ([math.exp(z / temperature) for z in logits] for logits in (student, teacher))
    p, q = [power / sum(p) for power in p], [power / sum(q) for power in q]
    return temperature**2 * sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))


def slow_map(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    total, count = 0.0, 0.0
    for image in range(student.shape[0]):
        for row in range(student.shape[2]):
            for column in range(student.shape[3]):
                weight = mask[image, row, column].item()
                for s, t in zip(
                    student[image, :, row, column].tolist(), teacher[image, :, row, column].tolist(), strict=True
                ):
                    total += weight * (s - t) ** 2
                    count += weight
    return total / max(1.0, 2 * count)


def nearest(mask: Tensor, height: int, width: int) -> Tensor:
    rows = [row * mask.shape[1] // height for row in range(height)]
    return mask[:, rows][:, :, [column * mask.shape[2] // width for column in range(width)]]


class TestDeFeat(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DeFeat(student, teacher, **ALL_ON, adapter=NO_ADAPTER)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DeFeat(student, teacher, **ALL_ON)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        boxes = [target.boxes for target in student.batch.targets]
        masks_of_levels = slow_masks(boxes, {stride: (x.shape[2], x.shape[3]) for stride, x in student.neck.items()})
        finest = slow_masks(boxes, {4: (16, 16)})[4]
        terms: dict[str, float] = {}
        for region, flip in (("foreground", 0), ("background", 1)):
            levels = [slow_map(x, teacher.neck[s], abs(flip - masks_of_levels[s])) for s, x in student.neck.items()]
            terms[f"neck.{region}"] = sum(levels) / 5
            stages = [(student.body[s], teacher.body[s]) for s in (8, 16, 32)]
            stages_of = [slow_map(s, t, abs(flip - nearest(finest, *s.shape[-2:]))) for s, t in stages]
            terms[f"backbone.{region}"] = sum(stages_of) / 3
        labels = torch.cat(teacher.rois.labels).tolist()
        logits = [view.roi_logits([])[0].tolist() for view in (student, teacher)]
        for group, temperature in (("positive", 3), ("negative", 1), ("all", 2)):
            values = [
                slow_kl(s, t, temperature)
                for s, t, label in zip(*logits, labels, strict=True)
                if group == "all" or (label > 0) == (group == "positive")
            ]
            terms[f"proposals.{group}"] = sum(values) / max(1, len(values))
        return terms


class TestDeFeatFullyRandom(TestDeFeat):
    """The other kinds of masks and of regions pass the grid too; their numbers are tested where they are made."""

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DeFeat(student, teacher, mask={"kind": "random"}, **self.subsampled(), adapter=NO_ADAPTER)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return DeFeat(
            student,
            teacher,
            mask={"kind": "fine_grained"},
            **self.subsampled(),
            adapter={"kernel": 1, "start": "default"},
        )

    @staticmethod
    def subsampled() -> dict[str, Mapping[str, Any]]:
        return {**ALL_ON, "proposals": {**ALL_ON["proposals"], "subsample_negatives": True, "source": "student"}}

    test_equals_its_oracle = None  # type: ignore[assignment]  # draws have none


# -- what is read, built and computed


def test_a_term_without_weight_is_neither_built_nor_computed() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed, dtype=torch.float32) for seed in (1, 2))
    loss = DeFeat(spec(), spec())
    assert loss.weights == {"neck.foreground": 4, "neck.background": 16}
    assert list(loss.maps) == ["neck"]
    assert loss(student, teacher).keys() == loss.weights.keys()
    assert teacher.reads == {"neck"}
    assert student.reads == {"neck"}

    only = DeFeat(spec(), spec(), neck={"background": 0})
    assert list(only(student, teacher)) == ["neck.foreground"]
    nothing = DeFeat(spec(), spec(), **OFF)
    assert nothing(student, teacher) == {}
    assert not list(nothing.parameters())


def test_backbone_alone_reads_no_neck_of_the_teacher() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed, dtype=torch.float32) for seed in (1, 2))
    loss = DeFeat(spec(), spec(), **OFF, backbone={"foreground": 1, "levels": [32]})
    loss(student, teacher)
    assert teacher.reads == {"body"}
    assert [name for name, _ in loss.named_parameters()] == [
        "maps.backbone.adapters.32.0.weight",
        "maps.backbone.adapters.32.0.bias",
    ]


def test_adapters_are_followed_by_relu_in_the_backbone_only() -> None:
    loss = DeFeat(spec(), spec(body=(3, 8, 9, 10), neck=12), backbone={"foreground": 1})
    assert isinstance(loss.get_submodule("maps.neck.adapters.64"), torch.nn.Conv2d)
    assert [type(part).__name__ for part in loss.get_submodule("maps.backbone.adapters.16").children()] == [
        "Conv2d",
        "ReLU",
    ]
    student = random_view(batch(OBJECTS), spec(), 1, dtype=torch.float32)
    teacher = random_view(batch(OBJECTS), spec(body=(3, 8, 9, 10), neck=12), 2, dtype=torch.float32)
    LossGrid.finite(loss(student, teacher))


def test_detectors_of_different_families_meet_at_shared_strides() -> None:
    one_stage = spec(strides=(8, 16, 32, 64, 128), two_stage=False)
    student = random_view(batch(OBJECTS), one_stage, 1)
    teacher = random_view(batch(OBJECTS), spec(), 2)
    loss = DeFeat(one_stage, spec(), adapter=NO_ADAPTER)
    assert loss.get_submodule("maps.neck").levels == [8, 16, 32, 64]
    grid = {s: (64 // s, 64 // s) for s in (8, 16, 32, 64)}
    expected = slow_masks([target.boxes for target in student.batch.targets], grid)
    value = sum(slow_map(student.neck[s], teacher.neck[s], expected[s]) for s in grid) / 4
    assert loss(*map(grad, (student, teacher)))["neck.foreground"].item() == pytest.approx(value)


def grad(view: FakeView) -> FakeView:
    return view.mapped(lambda x: x.clone().requires_grad_())


@pytest.mark.parametrize("kind", ["fine_grained", "gaussian", "ground_truth"])
def test_mask_kind_is_the_one_that_was_asked_for(kind: str) -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    value = DeFeat(spec(), spec(), mask={"kind": kind, "scale": 8.0, "threshold": 0.7}, adapter=NO_ADAPTER)(
        student, teacher
    )
    grid = {s: (64 // s, 64 // s) for s in STRIDES}
    weights = masks.Mask(kind, scale=8.0, threshold=0.7)(student, grid)
    for region, flip in (("foreground", 0), ("background", 1)):
        levels = [slow_map(student.neck[s], teacher.neck[s], abs(flip - weights[s])) for s in STRIDES]
        assert value[f"neck.{region}"].item() == pytest.approx(sum(levels) / 5, rel=1e-6)


def test_without_a_mask_all_cells_are_one_region() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    values = DeFeat(spec(), spec(), mask={"kind": "none"}, adapter=NO_ADAPTER)(student, teacher)
    expected = sum((student.neck[s] - teacher.neck[s]).square().mean().item() / 2 for s in STRIDES) / 5
    assert {name: value.item() for name, value in values.items()} == pytest.approx({"neck.foreground": expected})


def test_random_draws_change_with_epoch_and_seed_but_not_with_the_batch() -> None:
    student, teacher = (random_view(batch([OBJECTS[0]]), spec(), seed) for seed in (1, 2))

    def value(seed: int, epoch: int) -> float:
        loss = DeFeat(spec(), spec(), mask={"kind": "random"}, adapter=NO_ADAPTER, seed=seed)
        loss.on_epoch_start(epoch, None, None, None)
        return loss(student, teacher)["neck.foreground"].item()

    assert value(0, 0) == value(0, 0)
    assert len({value(0, 0), value(0, 1), value(1, 0)}) == 3
    images = batch([OBJECTS[0], NOTHING])
    pair = (random_view(images, spec(), seed) for seed in (1, 2))
    loss = DeFeat(spec(), spec(), mask={"kind": "random"}, adapter=NO_ADAPTER)
    assert loss(*pair)["neck.foreground"].item() == pytest.approx(value(0, 0))  # the second image has no object cell


# -- regions


def proposals_loss(student: DetectorSpec | None = None, teacher: DetectorSpec | None = None, **options: Any) -> DeFeat:
    return DeFeat(student or spec(), teacher or spec(), **OFF, proposals=options)


def test_regions_come_with_their_own_labels() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    teacher.stages["rois"] = teacher.rois._replace(labels=[1 - (labels > 0).long() for labels in teacher.rois.labels])
    values = {}
    for source in ("teacher", "student"):
        view = {"teacher": teacher, "student": student}[source]
        terms = proposals_loss(positive=1, temperature_positive=2, source=source)(student, teacher)
        kl = heads.kl_divergence(student.roi_logits([])[0], teacher.roi_logits([])[0], 2)
        positive = torch.cat(view.rois.labels) > 0
        values[source] = terms["proposals.positive"].item()
        assert values[source] == pytest.approx(kl[positive].mean().item())
    assert values["teacher"] != pytest.approx(values["student"])


def test_both_models_score_the_same_boxes() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    seen: list[Any] = []

    class Watched(FakeView):
        def roi_logits(self, boxes: Any) -> tuple[Tensor, Tensor]:
            seen.append(boxes)
            return super().roi_logits(boxes)

    watched = [Watched(view.batch, view.spec, **view.stages) for view in (student, teacher)]
    proposals_loss(all=1)(*watched)
    assert seen[0] is seen[1] is teacher.rois.boxes  # equal tensors, or the View would compute them again
    assert "rois" not in watched[0].reads


def test_negatives_are_thinned_to_the_positives_of_their_image() -> None:
    labels = [torch.tensor([0, 3, 0, 0, 1, 0]), torch.tensor([0, 0]), torch.tensor([1, 1, 0]), torch.zeros(0).long()]
    counts = torch.zeros(11)
    for seed in range(400):
        members = defeat.groups(labels, [seed, seed, seed, seed])
        kept = members["negative"]
        assert kept.sum() == 3
        assert kept[:6].sum() == 2
        assert not (kept & torch.cat(labels).bool()).any()
        assert torch.equal(members["all"], kept | members["positive"])
        counts += kept
    assert counts[[0, 2, 3, 5]].min() > 150  # each about 200 times
    assert counts[10] == 400


def test_a_teacher_with_more_classes_is_read_in_the_student_s_columns() -> None:
    student_spec, teacher_spec = spec(classes=("dog", "cat")), spec(classes=("cat", "cow", "dog", "hen"))
    student, teacher = random_view(batch(OBJECTS), student_spec, 1), random_view(batch(OBJECTS), teacher_spec, 2)
    value = proposals_loss(student_spec, teacher_spec, all=1, temperature_all=2)(student, teacher)[
        "proposals.all"
    ].item()
    pairs = zip(student.roi_logits([])[0].tolist(), teacher.roi_logits([])[0].tolist(), strict=True)
    expected = [slow_kl(s, [t[0], t[3], t[1]], 2) for s, t in pairs]
    assert value == pytest.approx(sum(expected) / len(expected))
    assert not proposals_loss(student_spec, teacher_spec, all=1).state_dict()


# -- refusals, all at construction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": {"levels": [4, 128]}}, r"the student has \[4, 8, 16, 32, 64\], the teacher \[4, 8, 16, 32, 64\]"),
        ({"neck": {"levels": []}}, "expected strides that both models have"),
        ({"backbone": {"foreground": 1, "levels": [64]}}, r"backbone.levels: .* shared are \[4, 8, 16, 32\]"),
        ({"neck": {"foregrund": 3}}, "neck: unknown option 'foregrund'.*did you mean 'foreground'"),
        ({"ramp": {"shape": "up"}}, "ramp.shape"),
        ({"mask": "gaussian"}, r"mask: expected options \(kind, scale, threshold\), got 'gaussian'.*mask.kind="),
        ({"ramp": {"warm": 1}}, "did you mean 'warmup'"),
        ({"ramp": {"terms": ["nek"]}}, r"ramp.terms: .*among neck.foreground, .* got \['nek'\]"),
        ({"ramp": {"terms": "neck"}}, "ramp.terms: expected a list"),
        ({"neck": {"foreground": -1}}, "DeFeat: expected weights"),
        ({"neck": {"foreground": math.nan}}, "DeFeat: expected weights"),
        ({"neck": {"foreground": "much"}}, "DeFeat: expected weights"),
        ({"mask": {"kind": "gt"}}, "mask.kind: expected one of"),
        ({"normalizer": "batch"}, "global or process"),
        ({"adapter": {"kernel": 4}}, "adapter"),
        ({"proposals": {"positive": 1, "source": "both"}}, "proposals.source"),
        ({"proposals": {"positive": 1, "temperature_positive": 0}}, "temperatures above 0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        DeFeat(spec(), spec(), **options)


def test_detectors_that_do_not_match_are_refused() -> None:
    one_stage = spec(two_stage=False)
    with pytest.raises(
        DistillError, match=r"the teacher is a retinanet, which has no rois\. Set the weights of proposals to 0"
    ):
        proposals_loss(spec(), one_stage, positive=1)
    with pytest.raises(DistillError, match=r"\['cow'\] of"):
        proposals_loss(spec(classes=("cow", "cat")), spec(classes=("cat", "Cow")), negative=1)
    with pytest.raises(DistillError, match=r"shared are \[\]"):
        DeFeat(spec(strides=(4, 8)), spec(strides=(16, 32)))
    with pytest.raises(DistillError, match="the student has 6 channels and the teacher 8"):
        DeFeat(spec(neck=6), spec(neck=8), adapter=NO_ADAPTER)
    DeFeat(spec(classes=("cow",)), one_stage)  # the neck does not care


def test_a_ramp_moves_the_terms_that_it_names() -> None:
    def factors(**ramp: Any) -> dict[str, float]:
        loss = DeFeat(spec(), spec(), **ALL_ON, ramp={"shape": "linear", **ramp})
        return {term: loss.factor(term, 0.75, 12) for term in loss.weights}

    assert set(factors().values()) == {0.25}
    chosen = factors(terms=["neck", "proposals.positive"])
    slowed = {"neck.foreground", "neck.background", "proposals.positive"}
    assert chosen == {term: 0.25 if term in slowed else 1.0 for term in chosen}
    assert len(chosen) == 7


# -- several processes


def part_of(view: FakeView, rows: slice, regions: int = 6) -> FakeView:
    stages = dict(view.stages)
    for name in ("body", "neck"):
        stages[name] = {s: x[rows].clone().requires_grad_() for s, x in stages[name].items()}
    cut = slice(rows.start * regions, rows.stop * regions)
    stages["roi_logits"] = tuple(x[cut].clone().requires_grad_() for x in stages["roi_logits"])
    stages["rois"] = stages["rois"]._replace(boxes=stages["rois"].boxes[rows], labels=stages["rois"].labels[rows])
    images = view.batch
    part = replace(images, targets=images.targets[rows], ids=images.ids[rows], sizes=images.sizes[rows])
    return FakeView(part, view.spec, **stages)


def scene() -> tuple[FakeView, FakeView]:
    images = batch([OBJECTS[0], OBJECTS[1], NOTHING, NOTHING])
    return random_view(images, spec(), 1), random_view(images, spec(), 2)


def gradients(rows: slice, normalizer: str) -> list[Tensor]:
    loss = DeFeat(spec(), spec(), **ALL_ON, normalizer=normalizer).double()
    values = loss(*(part_of(view, rows) for view in scene()))
    sum(loss.weights[name] * value for name, value in values.items()).backward()  # type: ignore[union-attr]
    return [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for normalizer in ("global", "process"):
        shared = gradients(slice(2 * rank, 2 * rank + 2), normalizer)
        for gradient in shared:
            dist.all_reduce(gradient)
        if rank == 0:
            torch.save([gradient / 2 for gradient in shared], f"{folder}/{normalizer}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Two images each, those of the second process without boxes; gradients averaged as DDP does."""
    run_in_two_processes(one_rank, str(tmp_path))
    whole = gradients(slice(0, 4), "global")
    shared = torch.load(tmp_path / "global.pt")
    assert len(shared) == len(whole) == 2 * (5 + 3)
    for gradient, expected in zip(shared, whole, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)
    apart = torch.load(tmp_path / "process.pt")
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(apart, whole, strict=True))


def test_boxes_of_any_dtype_and_equal_views() -> None:
    images = batch(OBJECTS)
    images = replace(images, targets=tuple(Target(target.boxes.double(), target.labels) for target in images.targets))
    student = grad(random_view(images, spec(), 1))
    values = DeFeat(spec(), spec(), adapter=NO_ADAPTER)(student, equal_views(student))
    assert all(value.item() == 0 for value in values.values())
