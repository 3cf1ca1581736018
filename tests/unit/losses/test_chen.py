"""Chen et al.: slow oracles, the factor on the student's own losses, and what pairs cannot work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.chen import Chen, bounded, soft_labels
from distill.losses.heads import flatten_anchors, label_deltas
from distill.types import AnchorTargets, DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, equal_views, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.two_processes import assert_two_equal_one

OFF: dict[str, Mapping[str, Any]] = {
    "rpn": {"soft": 0, "box": 0},
    "rcn": {"soft": 0, "box": 0},
    "hint": {"neck": 0},
}
TERMS = {"rpn.soft", "rpn.box", "rcn.soft", "rcn.box", "hint.neck"}


def only(**options: Any) -> dict[str, Any]:
    return {**OFF, **options}


# -- slow oracles


def slow_soft(student: list[float], teacher: list[float], background: float) -> float:
    p, q = ([math.exp(z) for z in logits] for logits in (student, teacher))
    weights = [background] + [1.0] * (len(student) - 1)
    return -sum(w * (t / sum(q)) * math.log(s / sum(p)) for w, s, t in zip(weights, p, q, strict=True))


def slow_bounded(student: list[float], teacher: list[float], truth: list[float], margin: float) -> float:
    student_error = sum((s - y) ** 2 for s, y in zip(student, truth, strict=True))
    teacher_error = sum((t - y) ** 2 for t, y in zip(teacher, truth, strict=True))
    return student_error if student_error + margin > teacher_error else 0.0


def slow_rpn(student: FakeView, teacher: FakeView, background: float, margin: float) -> tuple[float, float]:
    targets: AnchorTargets = student.anchor_targets
    soft, box, count = 0.0, 0.0, 0
    for image in range(len(student.batch)):
        n = 0
        for stride, x in student.objectness.items():
            anchors, height, width = x.shape[1:]
            for row in range(height):
                for column in range(width):
                    for a in range(anchors):
                        if targets.sampled[image, n]:
                            count += 1
                            z, v = (
                                view.objectness[stride][image, a, row, column].item() for view in (student, teacher)
                            )
                            soft += slow_soft([0, z], [0, v], background)
                            if targets.labels[image, n] > 0:
                                s, t = (
                                    view.deltas[stride][image, 4 * a : 4 * a + 4, row, column].tolist()
                                    for view in (student, teacher)
                                )
                                box += slow_bounded(s, t, targets.deltas[image, n].tolist(), margin)
                        n += 1
    return soft / max(1, count), box / max(1, count)


def slow_rcn(student: FakeView, teacher: FakeView, background: float, margin: float) -> tuple[float, float]:
    (logits, deltas), (teacher_logits, teacher_deltas) = student.roi_logits([]), teacher.roi_logits([])
    labels, truth = torch.cat(student.rois.labels).tolist(), torch.cat(student.rois.deltas).tolist()
    soft, box = 0.0, 0.0
    for region, label in enumerate(labels):
        soft += slow_soft(logits[region].tolist(), teacher_logits[region].tolist(), background)
        if label > 0:
            s, t = (all_deltas[region, 4 * label : 4 * label + 4].tolist() for all_deltas in (deltas, teacher_deltas))
            box += slow_bounded(s, t, truth[region], margin)
    return soft / max(1, len(labels)), box / max(1, len(labels))


def nonsense_elsewhere(view: FakeView) -> FakeView:
    """Box targets of negatives are infinite, as torchvision's coder makes them of an image without boxes."""
    targets, regions = view.anchor_targets, view.rois
    dense = targets.deltas.masked_fill(targets.labels[..., None] <= 0, -math.inf)
    pairs = zip(regions.deltas, regions.labels, strict=True)
    deltas = [deltas_of_image.masked_fill(labels[:, None] == 0, -math.inf) for deltas_of_image, labels in pairs]
    stages = {**view.stages, "anchor_targets": targets._replace(deltas=dense), "rois": regions._replace(deltas=deltas)}
    return FakeView(view.batch, view.spec, **stages)


class TestChen(LossGrid):
    options: Mapping[str, Any] = {"margin": 4.0}

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Chen(student, teacher, adapter={"kernel": None}, **self.options)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return Chen(student, teacher, **self.options)

    def views(self, boxes: list[list[list[float]]], dtype: torch.dtype = torch.float64) -> tuple[FakeView, FakeView]:
        student, teacher = super().views(boxes, dtype)
        return nonsense_elsewhere(student), teacher

    def distance(self, student: Tensor, teacher: Tensor) -> float:
        pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
        return sum((s - t) ** 2 for s, t in pairs) / len(pairs)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        assert isinstance(loss, Chen)
        choice = loss.background, loss.margin
        rpn, rcn = slow_rpn(student, teacher, *choice), slow_rcn(student, teacher, *choice)
        hint = sum(self.distance(x, teacher.neck[stride]) for stride, x in student.neck.items()) / 5
        return {"rpn.soft": rpn[0], "rpn.box": rpn[1], "rcn.soft": rcn[0], "rcn.box": rcn[1], "hint.neck": hint}

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        """... and both say the truth of boxes. A cross-entropy's minimum is the teacher's entropy, at weights of 1."""
        student = perfect_boxes(random_view(batch(OBJECTS), self.student, 1))
        teacher = equal_views(student)
        loss = Chen(self.student, self.teacher, adapter={"kernel": None}, **{**self.options, "background": 1.0})
        values = self.run(loss, student, teacher)
        assert [values[name].item() for name in ("rpn.box", "rcn.box", "hint.neck")] == [0, 0, 0]
        softs = values["rpn.soft"] + values["rcn.soft"]
        softs.backward()
        assert all(leaf.grad.abs().max() < 1e-12 for leaf in student.leaves() if leaf.grad is not None)
        entropies = slow_rpn(teacher, teacher, 1.0, 0)[0] + slow_rcn(teacher, teacher, 1.0, 0)[0]
        assert softs.item() == pytest.approx(entropies)


class TestChenOtherwise(TestChen):
    options: Mapping[str, Any] = {
        "hint": {"distance": "l1"},
        "background": 0.25,
        "margin": 9.0,
    }

    def distance(self, student: Tensor, teacher: Tensor) -> float:
        pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
        return sum(abs(s - t) for s, t in pairs) / len(pairs)


def perfect_boxes(view: FakeView) -> FakeView:
    """The same view, with targets that its deltas meet exactly."""
    regions, moves = view.rois, label_deltas(view.roi_logits([])[1], torch.cat(view.rois.labels))
    targets = view.anchor_targets._replace(deltas=flatten_anchors(view.deltas, 4))
    per_image = list(moves.split([len(labels) for labels in regions.labels]))
    return FakeView(
        view.batch, view.spec, **{**view.stages, "anchor_targets": targets, "rois": regions._replace(deltas=per_image)}
    )


# -- the mathematics


def test_soft_labels_of_sure_teachers_are_the_hard_loss_and_background_weighs_more() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 2])
    teacher = torch.full((6, 4), -500.0, dtype=torch.float64)
    teacher[torch.arange(6), labels] = 500.0
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    cost = soft_labels(logits, teacher, 1.5)
    assert torch.allclose(cost, hard * torch.tensor([1.5, 1, 1, 1, 1.5, 1]))


@pytest.mark.parametrize(
    ("student", "teacher", "margin", "expected"),
    [
        (2.0, 1.0, 0.0, 4.0),  # worse than the teacher: the whole distance, not the difference
        (1.0, 2.0, 0.0, 0.0),  # better
        (1.0, -2.0, 2.9, 0.0),  # better by 3, more than the margin
        (1.0, -2.0, 3.1, 1.0),  # better by 3, less than the margin
        (1.0, 1.0, 0.0, 0.0),  # equal: not above
    ],
)
def test_a_box_costs_nothing_once_it_beats_the_teacher(
    student: float, teacher: float, margin: float, expected: float
) -> None:
    s, t = (torch.tensor([[0.0, value, 0.0, 0.0]]) for value in (student, teacher))
    assert bounded(s, t, torch.zeros(1, 4), torch.tensor([True]), margin).tolist() == [expected]
    assert bounded(s, t, torch.full((1, 4), -math.inf), torch.tensor([False]), margin).tolist() == [0]


def test_anchors_come_in_the_order_of_the_view() -> None:
    """Each output holds the number of its anchor and column."""
    maps = {}
    for stride, (height, width) in {4: (2, 3), 8: (1, 2)}.items():
        maps[stride] = torch.zeros(1, 8, height, width)
        for row in range(height):
            for column in range(width):
                for channel in range(8):
                    start = 0 if stride == 4 else 12
                    anchor = start + (row * width + column) * 2 + channel // 4
                    maps[stride][0, channel, row, column] = anchor * 4 + channel % 4
    assert torch.equal(flatten_anchors(maps, 4), torch.arange(64.0).view(1, 16, 4))


# -- the student's own losses


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, {"loss_objectness": 0.5, "loss_classifier": 0.5}),
        ({"rpn": {"soft": 0.25}, "rcn": {"soft": 1.0}}, {"loss_objectness": 0.75, "loss_classifier": 0.0}),
        ({"rpn": {"soft": 0}}, {"loss_classifier": 0.5}),
        ({"rpn": {"soft": 0, "box": 9}, "rcn": {"soft": 0}}, {}),
        (OFF, {}),
    ],
)
def test_hard_and_soft_labels_share_one_weight(options: dict[str, Any], factors: dict[str, float]) -> None:
    loss = Chen(spec(), spec(), **options)
    assert loss.supervised == factors
    for head, own in (("rpn", "loss_objectness"), ("rcn", "loss_classifier")):
        assert loss.weights.get(f"{head}.soft", 0) + loss.supervised.get(own, 1) == 1


# -- what is read, built and computed


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({"rpn": {"soft": 1, "box": 0}}, {"anchor_targets", "objectness"}),
        ({"rpn": {"soft": 0, "box": 1}}, {"anchor_targets", "deltas"}),
        ({"rcn": {"soft": 0, "box": 1}}, {"rois", "roi_logits"}),
        ({"hint": {"neck": 1}}, {"neck"}),
        ({}, set()),
    ],
)
def test_a_term_without_weight_is_neither_built_nor_computed(options: dict[str, Any], reads: set[str]) -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed, dtype=torch.float32) for seed in (1, 2))
    loss = Chen(spec(), spec(), **only(**options))
    assert loss(student, teacher).keys() == loss.weights.keys()
    assert student.reads == reads
    assert teacher.reads == reads - {"anchor_targets", "rois"}  # the regions, and the sample, are the student's
    assert bool(list(loss.parameters())) == ("hint" in options)


def test_both_models_judge_the_student_s_regions() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    seen: list[Any] = []

    class Watched(FakeView):
        def roi_logits(self, boxes: Any) -> tuple[Tensor, Tensor]:
            seen.append(boxes)
            return super().roi_logits(boxes)

    Chen(spec(), spec(), **only(rcn={}))(
        *(Watched(view.batch, view.spec, **view.stages) for view in (student, teacher))
    )
    assert seen[0] is seen[1] is student.rois.boxes  # equal tensors, or the View would compute them again


def test_a_teacher_with_more_classes_is_read_in_the_student_s_columns() -> None:
    student_spec, teacher_spec = spec(classes=("dog", "cat")), spec(classes=("cat", "cow", "dog", "hen"))
    student, teacher = random_view(batch(OBJECTS), student_spec, 1), random_view(batch(OBJECTS), teacher_spec, 2)
    student.stages["rois"] = student.rois._replace(labels=[torch.tensor([1, 2, 0, 1, 2, 0])] * 2)
    values = Chen(student_spec, teacher_spec, **only(rcn={}))(student, teacher)

    twin = random_view(batch(OBJECTS), student_spec, 2)
    logits, deltas = teacher.roi_logits([])
    blocks = deltas.view(len(deltas), 5, 4)
    twin.stages["roi_logits"] = logits[:, [0, 3, 1]], blocks[:, [0, 3, 1]].flatten(1)
    soft, box = slow_rcn(student, twin, 1.5, 0.01)
    assert values["rcn.soft"].item() == pytest.approx(soft)
    assert values["rcn.box"].item() == pytest.approx(box)
    assert not Chen(student_spec, teacher_spec, **only(rcn={})).state_dict()


@pytest.mark.parametrize("term", sorted(TERMS - {"rpn.box", "rcn.box"}))
def test_the_loss_falls_when_only_it_is_minimised(term: str) -> None:
    head, last = term.split(".")
    first, final = descend(200.0 if head == "rpn" else 2.0, **only(**{head: {**OFF[head], last: 1}}))
    assert final < 0.9 * first


@pytest.mark.parametrize("head", ["rpn", "rcn"])
def test_boxes_are_pulled_until_they_beat_the_teacher(head: str) -> None:
    first, final = descend(20.0 if head == "rpn" else 2.0, **only(**{head: {"soft": 0, "box": 1}}))
    assert first > 0
    assert final == 0


def descend(rate: float, **options: Any) -> tuple[float, float]:
    """First and last value of 100 steps of gradient descent on the student's leaves and the adapters."""
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    loss = Chen(spec(), spec(), **options).double()
    leaves = [leaf.requires_grad_() for leaf in student.leaves()]
    optimizer = torch.optim.SGD([*leaves, *loss.parameters()], lr=rate)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        (value,) = loss(student, teacher).values()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values[0], values[-1]


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rpn": {"soft": 1.2}}, r"1 - mu, from 0 to 1, got {'rpn': 1.2, 'rcn': 0.5}"),
        ({"rcn": {"mu": 0.5}}, "rcn: unknown option 'mu'"),
        ({"rcn": {"box": -1}}, "Chen: expected weights"),
        ({"rcn": {"box": "nu"}}, "Chen: expected weights"),
        ({"hint": {"levels": [128]}}, r"hint.levels: expected strides that both models have"),
        ({"hint": {"distance": "l3"}}, "hint.distance: expected l2 or l1, got 'l3'"),
        ({"background": -1.5}, "background: expected a number, 0 or more"),
        ({"background": None}, "background: expected a number, 0 or more"),
        ({"margin": math.nan}, "margin: expected a number, 0 or more"),
        ({"adapter": {"relu": True, "kernel": None}}, "adapter: a ReLU follows a convolution"),
        ({"normalizer": "batch"}, "global or process"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        Chen(spec(), spec(), **options)


def test_detectors_that_do_not_match_are_refused() -> None:
    one_stage = spec(two_stage=False)
    with pytest.raises(
        DistillError, match=r"rpn: the teacher is a retinanet, which has no objectness\. Set the weights of rpn to 0"
    ):
        Chen(spec(), one_stage)
    with pytest.raises(DistillError, match=r"rcn: the student is a retinanet"):
        Chen(one_stage, spec(), **only(rcn={}))
    with pytest.raises(DistillError, match=r"anchors per cell .*{4: 3.* of the student and {4: 9.* of the teacher"):
        Chen(spec(), spec(anchors=9))
    with pytest.raises(DistillError, match="same strides"):
        Chen(spec(strides=(4, 8)), spec())
    with pytest.raises(DistillError, match=r"\['cow'\] of"):
        Chen(spec(classes=("cow", "cat")), spec(classes=("cat", "Cow")))
    Chen(spec(classes=("cow",)), spec(anchors=9), **only(hint={}))  # the neck does not care
    Chen(spec(classes=("cow",)), spec(), **only(rpn={}))  # nor does the RPN, of classes
    Chen(spec(), spec(anchors=9), **only(rcn={}))  # nor the box head, of anchors


def test_hints_serve_every_pair_that_shares_strides() -> None:
    one_stage = spec(strides=(8, 16, 32, 64, 128), two_stage=False, anchors=9)
    student, teacher = random_view(batch(OBJECTS), one_stage, 1), random_view(batch(OBJECTS), spec(neck=8), 2)
    loss = Chen(one_stage, spec(neck=8), **only(hint={})).double()
    assert loss.get_submodule("hint").levels == [8, 16, 32, 64]
    assert {type(adapter) for adapter in loss.get_submodule("hint.adapters").children()} == {torch.nn.Conv2d}
    assert loss(student, teacher)["hint.neck"] > 0


def test_anchors_of_other_sizes_are_refused() -> None:
    larger = replace(spec(), anchor_options={"anchors.sizes": [[64]] * 5})
    with pytest.raises(DistillError, match=r"rpn: expected equal anchors, but anchors\.sizes is None .* \[\[64\]"):
        Chen(spec(), larger, **only(rpn={}))
    Chen(spec(), larger, **only(rcn={}))


def test_a_box_without_area_counts_nothing() -> None:
    """Its targets are log(0); the other positives count as before."""
    student, teacher, truth = torch.zeros(3, 4), torch.full((3, 4), 2.0), torch.ones(3, 4)
    truth[1, 2] = -torch.inf
    student.requires_grad_()
    errors = bounded(student, teacher, truth, torch.tensor([True, True, False]), margin=0.01)
    assert errors.tolist() == [4.0, 0.0, 0.0]
    errors.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[-2.0] * 4, [0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rpn": {"soft": 1}}, "rpn, objectness at stride 4"),
        ({"rpn": {"soft": 0, "box": 1}}, "rpn, deltas at stride 4"),
        ({"rcn": {}}, r"rcn, logits of regions \(R, K\+1\)"),
    ],
)
def test_a_head_s_wrong_shape_is_refused(options: dict[str, Any], message: str) -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    with pytest.raises(DistillError, match=f"{message}: expected student and teacher of equal shape"):
        Chen(spec(), spec(), **only(**options))(student.mapped(lambda x: x[..., :-1]), teacher)


# -- several processes


def scene() -> tuple[FakeView, FakeView]:
    """The first process has all boxes, and more sampled anchors for it."""
    images = batch([OBJECTS[0], OBJECTS[1], NOTHING, NOTHING])
    student, teacher = random_view(images, spec(), 1), random_view(images, spec(), 2)
    targets = student.anchor_targets
    sampled = targets.sampled.clone()
    sampled[2:, ::2] = False
    student.stages["anchor_targets"] = targets._replace(sampled=sampled)
    return student, teacher


def make(normalizer: str) -> DistillLoss:
    return Chen(spec(), spec(), normalizer=normalizer).double()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert_two_equal_one(make, scene, tmp_path)


def test_an_image_without_boxes_has_soft_labels_but_no_box_to_learn() -> None:
    student, teacher = (random_view(batch([NOTHING]), replace(spec()), seed) for seed in (1, 2))
    values = Chen(spec(), spec()).double()(student, teacher)
    assert values.keys() == TERMS
    assert values["rpn.box"] == values["rcn.box"] == 0
    assert values["rpn.soft"] > 0
    assert values["rcn.soft"] > 0
