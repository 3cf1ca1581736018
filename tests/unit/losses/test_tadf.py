"""TADF-style: slow oracles, which boxes are taught, and what pairs cannot work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from distill.boxes import paired_iou
from distill.losses import tadf
from distill.losses.base import DistillLoss
from distill.losses.tadf import TADF
from distill.types import DetectorSpec, DistillError, Regions
from helpers.fake_view import FakeView, batch, equal_views, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.two_processes import assert_two_equal_one

OFF: dict[str, Mapping[str, Any]] = {
    "neck": {"foreground": 0},
    "head": {"classification": 0, "regression": 0},
}
TERMS = ["neck.foreground", "head.classification", "head.regression"]


def only(term: str) -> dict[str, Any]:
    place, last = term.split(".")
    return {**OFF, place: {**OFF[place], last: 1}}


# -- slow oracles


def slow_gaussian(boxes: list[list[float]], stride: int, height: int, width: int, level: int, levels: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.float64)
    for x1, y1, x2, y2 in boxes:
        side = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
        if min(levels - 1, max(0, math.floor(math.log2(side / 56 + 1e-6)))) != level:
            continue
        left, top, right, bottom = int(x1 / stride), int(y1 / stride), int(x2 / stride), int(y2 / stride)
        right, bottom = min(right, width), min(bottom, height)
        if left >= right or top >= bottom:
            mask[min(top, height - 1), min(left, width - 1)] = 1
            continue
        w, h = right - left, bottom - top
        for y in range(h):
            for x in range(w):
                bump = math.exp(-0.5 * ((x - w / 2) / (w / 2)) ** 2) * math.exp(-0.5 * ((y - h / 2) / (h / 2)) ** 2)
                mask[top + y, left + x] = max(mask[top + y, left + x].item(), bump)
    return mask


@pytest.mark.parametrize(
    ("largest", "value", "slope"),
    [(12.0, 6.99614882, 0.60663432), (16.0, 9.42272221, 0.60664607), (30.0, 17.91576997, 0.60664628)],
)
def test_golden_values_of_a_confident_wrong_student(largest: float, value: float, slope: float) -> None:
    """Value and slope by the largest logit, from 50 decimal digits."""
    student = torch.tensor([[0.0, largest, 0.3]], requires_grad=True)
    loss = tadf.binary_cross_entropy(student, torch.tensor([[2.0, 0.0, 1.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=3e-7)
    assert student.grad is not None
    assert student.grad[0, 1].item() == pytest.approx(slope, rel=3e-6)


@pytest.mark.parametrize("largest", [12.0, 16.0, 18.0, 30.0, 300.0])
def test_the_cross_entropy_of_a_confident_wrong_student_keeps_its_digits(largest: float) -> None:
    """-log(1 - s) of a softmax s that rounds to 1 in float32, with its gradient, against float64 without 1 - s."""
    values, teacher = (0.0, largest, 0.3), torch.tensor([[2.0, 0.0, 1.0]])
    t = [math.exp(z) / sum(math.exp(other) for other in teacher[0].tolist()) for z in teacher[0].tolist()]
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    total = exact.logsumexp(0)
    expected = exact.new_zeros(())
    for k in range(3):
        others = torch.stack([exact[j] for j in range(3) if j != k]).logsumexp(0)
        expected = expected - (t[k] * (exact[k] - total) + (1 - t[k]) * (others - total)) / 3
    expected.backward()
    student = torch.tensor([values], requires_grad=True)
    loss = tadf.binary_cross_entropy(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad is not None
    assert exact.grad is not None
    assert student.grad[0].tolist() == pytest.approx(exact.grad.tolist(), rel=1e-5, abs=1e-7)


def slow_neck(student: FakeView, teacher: FakeView) -> float:
    levels = []
    for level, (stride, student_map) in enumerate(student.neck.items()):
        total, count = 0.0, 0.0
        for image, target in enumerate(student.batch.targets):
            height, width = student_map.shape[-2:]
            mask = slow_gaussian(target.boxes.tolist(), stride, height, width, level, len(student.neck))
            for y in range(height):
                for x in range(width):
                    pair = zip(
                        student_map[image, :, y, x].tolist(), teacher.neck[stride][image, :, y, x].tolist(), strict=True
                    )
                    total += mask[y, x].item() * sum((s - t) ** 2 for s, t in pair)
                    count += 2 * mask[y, x].item()
        levels.append(total / max(1.0, count))
    return sum(levels) / len(levels)


def slow_bce(student: list[float], teacher: list[float]) -> float:
    p, q = ([math.exp(z) for z in logits] for logits in (student, teacher))
    p, q = [power / sum(p) for power in p], [power / sum(q) for power in q]
    terms = [-t * math.log(s) - (1 - t) * math.log(1 - s) for s, t in zip(p, q, strict=True)]
    return sum(terms) / len(terms)


def slow_smooth_l1(student: list[float], teacher: list[float]) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        d = abs(s - t)
        total += 0.5 * d * d * 9 if d < 1 / 9 else d - 0.5 / 9
    return total


def slow_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def slow_heads(student: FakeView, teacher: FakeView) -> tuple[float, float, int]:
    """Classification, regression, and how many regions the latter took."""
    regions: Regions = student.rois
    labels, boxes, truth = (
        torch.cat(of_images).tolist() for of_images in (regions.labels, regions.boxes, regions.truth)
    )
    (logits, deltas), (teacher_logits, teacher_deltas) = student.roi_logits([]), teacher.roi_logits([])
    moved = teacher.roi_boxes([])
    bce, box, positives, taken = 0.0, 0.0, 0, 0
    for region, label in enumerate(labels):
        if label == 0:
            continue
        positives += 1
        bce += slow_bce(logits[region].tolist(), teacher_logits[region].tolist())
        if slow_iou(moved[region, label].tolist(), truth[region]) > slow_iou(boxes[region], truth[region]):
            taken += 1
            pair = (all_deltas[region, 4 * label : 4 * label + 4].tolist() for all_deltas in (deltas, teacher_deltas))
            box += slow_smooth_l1(*pair)
    return bce / max(1, positives), box / max(1, positives), taken


def pair_of(
    images: Any, student: DetectorSpec, teacher: DetectorSpec, dtype: torch.dtype = torch.float64
) -> tuple[FakeView, FakeView]:
    """Every other positive is corrected by the teacher, all the way to its truth, the others are not."""
    student_view, teacher_view = (
        random_view(images, student, 1, dtype=dtype),
        random_view(images, teacher, 2, dtype=dtype),
    )
    boxes, truth = torch.cat(student_view.rois.boxes), torch.cat(student_view.rois.truth)
    steps = torch.tensor([1.0, 0, 0, -1.0, 0, 0]).repeat(len(images))[: len(boxes)]
    moved = boxes + steps[:, None] * (truth - boxes)
    teacher_view.stages["roi_boxes"] = moved[:, None].repeat(1, len(teacher.classes) + 1, 1)
    return student_view, teacher_view


class TestTADF(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return TADF(student, teacher, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return TADF(student, teacher)

    def views(self, boxes: list[list[list[float]]], dtype: torch.dtype = torch.float64) -> tuple[FakeView, FakeView]:
        return pair_of(batch(boxes), self.student, self.teacher, dtype)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        classification, regression, taken = slow_heads(student, teacher)
        assert taken == sum(bool(len(target.boxes)) for target in student.batch.targets)
        assert (taken > 0) == (regression > 0)
        neck = slow_neck(student, teacher)
        return {"neck.foreground": neck, "head.classification": classification, "head.regression": regression}

    relative = 1e-6
    """The mask is float32."""

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        """A cross-entropy's minimum is the teacher's own entropy."""
        student, _ = self.views(OBJECTS)
        teacher = equal_views(student)
        values = self.run(self.loss(self.student, self.student), student, teacher)
        assert values["neck.foreground"] == values["head.regression"] == 0
        assert values["head.classification"].item() == pytest.approx(slow_heads(teacher, teacher)[0])
        values["head.classification"].backward()
        assert student.roi_logits([])[0].grad.abs().max() < 1e-12  # type: ignore[union-attr]

    def test_an_image_twice(self) -> None:
        """As in the grid, but the teacher's boxes are those of `pair_of`."""
        values = []
        for count in (1, 2):
            images = batch([OBJECTS[0]] * count)
            student, teacher = pair_of(same_ids(images), self.student, self.teacher)
            values.append(self.run(self.loss(self.student, self.teacher), student, teacher))
        for name, value in values[1].items():
            assert value.item() == pytest.approx(values[0][name].item(), rel=1e-9), name
            assert value > 0


def same_ids(images: Any) -> Any:
    return type(images)(**{**vars(images), "ids": (7,) * len(images)})


# -- the mathematics


def test_a_student_that_is_wrong_and_sure_still_learns() -> None:
    student = torch.tensor([[80.0, 0.0, -80.0]], requires_grad=True)
    value = tadf.binary_cross_entropy(student, torch.tensor([[-80.0, 80.0, -80.0]])).sum()
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0, 1] < -0.3  # towards the teacher's class


def test_binary_cross_entropy_is_torch_s() -> None:
    student, teacher = torch.randn(2, 50, 5, dtype=torch.float64) * 4
    expected = torch.nn.functional.binary_cross_entropy(student.softmax(1), teacher.softmax(1), reduction="none")
    assert torch.allclose(tadf.binary_cross_entropy(student, teacher), expected.mean(1))


def test_iou_is_torchvision_s_row_by_row_and_survives_empty_boxes() -> None:
    low, side = torch.rand(2, 40, 2) * 30, torch.rand(2, 40, 2) * 20
    first, second = torch.cat([low, low + side], dim=2)
    assert torch.allclose(paired_iou(first, second), box_iou(first, second).diag())
    nothing = torch.zeros(2, 4)
    assert paired_iou(nothing, nothing).tolist() == [0, 0]
    inverted = torch.tensor([[5.0, 5.0, 1.0, 1.0]])
    assert paired_iou(inverted, torch.tensor([[0.0, 0.0, 9.0, 9.0]])).tolist() == [0]


# -- which regions are taught


def test_only_positives_that_the_teacher_mends_are_taught_their_box() -> None:
    """Regions: corrected, unchanged, made worse, corrected in the column of another class only, corrected negative."""
    known = spec(classes=("cat", "dog"))
    student, teacher = (random_view(batch(OBJECTS[:1]), known, seed, regions=5) for seed in (1, 2))
    truth = torch.tensor([[10.0, 10.0, 30.0, 30.0]]).repeat(5, 1)
    boxes, labels = truth + 2, torch.tensor([2, 2, 2, 2, 0])
    moved = boxes[:, None].repeat(1, 3, 1)
    moved[0, 2], moved[2, 2], moved[3, 1], moved[4] = truth[0], truth[2] + 4, truth[3], truth[4]
    student.stages["rois"] = Regions([boxes], [labels], [truth], [torch.zeros(5, 4)])
    teacher.stages["roi_boxes"] = moved
    value = TADF(known, known, **only("head.regression"))(student, teacher)["head.regression"].item()
    first = [view.roi_logits([])[1][0, 8:].tolist() for view in (student, teacher)]
    assert value == pytest.approx(slow_smooth_l1(*first) / 4)  # of four positives


def test_a_teacher_with_more_classes_is_read_in_the_student_s_columns() -> None:
    student_spec, teacher_spec = spec(classes=("dog", "cat")), spec(classes=("cat", "cow", "dog", "hen"))
    student, teacher = pair_of(batch(OBJECTS), student_spec, teacher_spec)
    student.stages["rois"] = student.rois._replace(labels=[torch.tensor([1, 2, 0, 1, 2, 0])] * 2)
    values = TADF(student_spec, teacher_spec, neck={"foreground": 0})(student, teacher)

    twin = random_view(batch(OBJECTS), student_spec, 2)
    logits, deltas = teacher.roi_logits([])
    twin.stages["roi_logits"] = logits[:, [0, 3, 1]], deltas.view(len(deltas), 5, 4)[:, [0, 3, 1]].flatten(1)
    twin.stages["roi_boxes"] = teacher.roi_boxes([])[:, [0, 3, 1]]
    classification, regression, taken = slow_heads(student, twin)
    assert taken
    assert values["head.classification"].item() == pytest.approx(classification)
    assert values["head.regression"].item() == pytest.approx(regression)


def test_the_columns_of_boxes_follow_the_teacher_s_list() -> None:
    """Only the teacher's dog, its third label, corrects the student's dog, its first."""
    student_spec, teacher_spec = spec(classes=("dog", "cat")), spec(classes=("cat", "cow", "dog", "hen"))
    values = []
    for column in (1, 3):
        student, teacher = pair_of(batch(OBJECTS), student_spec, teacher_spec)
        boxes = torch.cat(student.rois.boxes)
        moved = boxes[:, None].repeat(1, 5, 1)
        moved[:, column] = torch.cat(student.rois.truth)
        teacher.stages["roi_boxes"] = moved
        values.append(
            TADF(student_spec, teacher_spec, **only("head.regression"))(student, teacher)["head.regression"].item()
        )
    assert values[0] == 0 < values[1]


# -- what is read, built and computed


@pytest.mark.parametrize(
    ("options", "student_reads", "teacher_reads"),
    [
        (only("neck.foreground"), {"neck"}, {"neck"}),
        (only("head.classification"), {"rois", "roi_logits"}, {"roi_logits"}),
        (only("head.regression"), {"rois", "roi_logits"}, {"roi_logits", "roi_boxes"}),
        (OFF, set(), set()),
    ],
)
def test_a_term_without_weight_is_neither_built_nor_computed(
    options: dict[str, Any], student_reads: set[str], teacher_reads: set[str]
) -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed, dtype=torch.float32) for seed in (1, 2))
    loss = TADF(spec(), spec(), **options)
    assert loss(student, teacher).keys() == loss.weights.keys()
    assert (student.reads, teacher.reads) == (student_reads, teacher_reads)
    assert bool(list(loss.parameters())) == ("neck.foreground" in loss.weights)


def test_the_weight_falls_to_nothing_unless_told_otherwise() -> None:
    factors = [TADF(spec(), spec()).factor("neck.foreground", (t - 1) / 12, 12) for t in range(1, 13)]
    assert factors == pytest.approx([1 - (t - 1) / 12 for t in range(1, 13)])
    late = TADF(spec(), spec(), ramp={"warmup": 6}).factor("neck.foreground", 0.75, 12)
    assert late == 0.25  # another option of the ramp leaves its shape
    assert TADF(spec(), spec(), ramp={"shape": "constant"}).factor("neck.foreground", 0.75, 12) == 1


@pytest.mark.parametrize("term", TERMS)
def test_the_loss_falls_when_only_it_is_minimised(term: str) -> None:
    student, teacher = pair_of(batch(OBJECTS), spec(), spec())
    loss = TADF(spec(), spec(), **only(term)).double()
    leaves = [leaf.requires_grad_() for leaf in student.leaves()]
    optimizer = torch.optim.SGD([*leaves, *loss.parameters()], lr=0.2)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(student, teacher)[term]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": {"background": 1}}, "neck: unknown option 'background'"),
        ({"neck": {"levels": [128]}}, "neck.levels: expected strides that both models have"),
        ({"mask": {"scale": 0}}, "mask.scale"),
        ({"head": {"regression": -1}}, "TADF: expected weights"),
        ({"head": {"regresion": 1}}, "did you mean 'regression'"),
        ({"ramp": {"shape": "down"}}, "ramp.shape"),
        ({"adapter": {"kernel": 4}}, "adapter"),
        ({"adapter": {"relu": True, "kernel": None}}, "adapter: a ReLU follows a convolution"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        TADF(spec(), spec(), **options)


def test_detectors_that_do_not_match_are_refused() -> None:
    one_stage = spec(strides=(8, 16, 32, 64, 128), two_stage=False)
    with pytest.raises(
        DistillError, match=r"head: the teacher is a retinanet, which has no rois\. Set the weights of head to 0"
    ):
        TADF(spec(), one_stage)
    with pytest.raises(DistillError, match=r"\['cow'\] of"):
        TADF(spec(classes=("cow", "cat")), spec(classes=("cat", "Cow")))
    neck_alone = TADF(one_stage, spec(classes=("cow",)), **only("neck.foreground"))
    assert neck_alone.get_submodule("neck").levels == [8, 16, 32, 64]


def test_a_head_s_wrong_shape_is_refused() -> None:
    student, teacher = pair_of(batch(OBJECTS), spec(), spec())
    with pytest.raises(
        DistillError, match=r"head, logits of regions \(R, K\+1\): expected student and teacher of equal shape"
    ):
        TADF(spec(), spec(), **only("head.classification"))(student.mapped(lambda x: x[..., :-1]), teacher)


# -- several processes


def scene() -> tuple[FakeView, FakeView]:
    """The second process has a box in one image only."""
    return pair_of(batch([OBJECTS[0], OBJECTS[1], NOTHING, OBJECTS[1]]), spec(), spec())


def make(normalizer: str) -> DistillLoss:
    return TADF(spec(), spec(), normalizer=normalizer).double()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert_two_equal_one(make, scene, tmp_path, relative=1e-6)  # the mask is float32
