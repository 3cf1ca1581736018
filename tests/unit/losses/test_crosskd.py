"""CrossKD: the alignment and both terms by loops, and the towers of real heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchvision.ops import generalized_box_iou

from distill.detectors.towers import split_tower
from distill.losses.adl import ADL
from distill.losses.base import DistillLoss
from distill.losses.bckd import BCKD
from distill.losses.crosskd import CrossKD, aligned, centerness
from distill.losses.cwd import CWD
from distill.losses.dist import DIST
from distill.losses.frs import FRS
from distill.losses.response import Response
from distill.types import Batch, DetectorSpec, DistillError, Target
from helpers.detectors import padded_batch, random_detector
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, OracleOfTwins


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_aligned(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(student)
    for channel in range(student.shape[1]):
        x, y = student[:, channel], teacher[:, channel]
        own, target = (math.sqrt(((v - v.mean()) ** 2).sum().item() / max(1, v.numel() - 1)) for v in (x, y))
        out[:, channel] = (x - x.mean()) / (own + 1e-6) * target + y.mean()
    return out


class TestCrossKD(OracleOfTwins):
    student = spec(two_stage=False, strides=(8, 16, 32), anchors=2)
    teacher = spec(two_stage=False, strides=(8, 16, 32), anchors=2)
    relative = 1e-6  # anchors are float32
    options: Mapping[str, Any] = {}

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return CrossKD(student, teacher, **self.options)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return CrossKD(student, teacher, adapter={"kernel": 1}, **self.options)

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        views = super().pair(images, **options)
        for seed, view in enumerate(views):
            dtype = view.neck[8].dtype
            generators = [torch.Generator().manual_seed(100 * seed + image) for image in images.ids]
            for branch, channels in (("classes", 8), ("boxes", 8)):
                view.stages[f"tower_{branch}"] = {
                    at: torch.stack([torch.randn(6, *x.shape[2:], generator=g, dtype=dtype) for g in generators])
                    for at, x in view.neck.items()
                }
                view.stages[f"head_{branch}"] = torch.linspace(-1, 1, 6 * channels).view(channels, 6).double().cos()
        return views

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        targets = student.stages["anchor_targets"]
        sums, anchor = [0.0, 0.0], 0
        for at, x in student.stages["tower_classes"].items():
            features = [
                slow_aligned(own, teacher.stages[f"tower_{branch}"][at]).clamp(min=0)
                for branch, own in (("classes", x), ("boxes", student.stages["tower_boxes"][at]))
            ]
            corners = student.stages["anchors"][at].view(*x.shape[2:], 2, 4)
            for image in range(len(x)):
                for row in range(x.shape[2]):
                    for column in range(x.shape[3]):
                        cell = (image, slice(None), row, column)
                        p = (teacher.stages["head_classes"] @ features[0][cell]).view(2, 4).tolist()
                        q = teacher.class_logits[at][cell].view(2, 4).tolist()
                        moves = (teacher.stages["head_boxes"] @ features[1][cell]).view(2, 4)
                        target = teacher.deltas[at][cell].view(2, 4)
                        for a in range(2):
                            index = anchor + (row * x.shape[3] + column) * 2 + a
                            if targets.labels[image, index] < 0:
                                continue
                            for logit, other in zip(p[a], q[a], strict=True):
                                s, t = sigmoid(logit), sigmoid(other)
                                sums[0] -= abs(s - t) * (t * math.log(s) + (1 - t) * math.log(1 - s))
                            box = (
                                (corners[row, column, a] + moves[a])[None],
                                (corners[row, column, a] + target[a])[None],
                            )
                            sums[1] += max(map(sigmoid, q[a])) * (1 - generalized_box_iou(*box).item())
            anchor += corners.numel() // 4
        positives = sum(max(1, int((labels > 0).sum())) for labels in targets.labels)
        return {term: value / positives for term, value in zip(("heads.classes", "heads.boxes"), sums, strict=True)}

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        """Only where the teacher's outputs are those of its own tower, as in a real view."""
        detector, data = random_detector("retinanet"), padded_batch()
        student, teacher = detector.view(data), detector.view(data, frozen=True)
        values = CrossKD(detector.spec, detector.spec, box_error="giou")(student, teacher)
        assert all(abs(value.item()) < 1e-4 for value in values.values())


def test_alignment_keeps_what_is_aligned() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5).double() * 3 + 1, torch.randn(2, 3, 4, 5).double()
    torch.testing.assert_close(aligned(student, teacher), slow_aligned(student, teacher))
    torch.testing.assert_close(aligned(teacher, teacher), teacher, rtol=1e-5, atol=1e-5)


def test_centerness_is_that_of_fcos() -> None:
    assert centerness(torch.tensor([[1.0, 2.0, 4.0, 2.0], [3.0, 3.0, 3.0, 3.0]])).tolist() == pytest.approx([0.5, 1])


@pytest.mark.parametrize(
    ("family", "depth", "options"),
    [
        ("retinanet", 3, {}),
        ("retinanet", 0, {}),
        ("fcos", 2, {}),
        ("fcos", 1, {"level_scales": True, "distances": "exp", "head_norm": "none"}),
    ],
)
def test_the_rest_of_a_head_on_its_own_features_gives_its_own_outputs(
    family: str, depth: int, options: dict[str, Any]
) -> None:
    detector, data = random_detector(family, **options), padded_batch()
    view = detector.view(data, frozen=True)
    for branch, outputs in (("classes", view.class_logits), ("boxes", view.deltas)):
        features = view.tower_features(branch, depth)
        inputs = {at: (x.relu() if depth else x).requires_grad_() for at, x in features.items()}
        finished = view.finish_tower(branch, depth, inputs)
        for at, x in outputs.items():
            torch.testing.assert_close(finished[at], x, rtol=1e-5, atol=1e-6)
        sum(x.sum() for x in finished.values()).backward()
        assert all(x.grad is not None for x in inputs.values())
    assert all(parameter.grad is None for parameter in detector.parameters() if not parameter.requires_grad)


def test_the_gradient_of_a_step_reaches_the_students_tower_and_not_the_teacher() -> None:
    """FCOS divides by its centerness."""
    student, teacher = random_detector("fcos"), random_detector("fcos", seed=1).eval()
    teacher.requires_grad_(False)
    data = padded_batch()
    loss = CrossKD(student.spec, teacher.spec, heads={"classes": 0.4, "boxes": 0.75}, depth=2, box_error="log_iou")
    values = loss(student.view(data), teacher.view(data, frozen=True))
    assert all(value.isfinite() and value > 0 for value in values.values())
    sum(values.values()).backward()
    head = student.net.head
    for tower in (head.classification_head.conv, head.regression_head.conv):
        used, unused = (split_tower(tower, 2)[part] for part in (0, 1))
        assert all(p.grad is not None and p.grad.any() for layer in used[:1] for p in layer.parameters())
        assert all(p.grad is None for layer in unused for p in layer.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_fcos_divides_by_its_centerness_also_below_1_and_by_1_without_objects() -> None:
    """Only the divisor depends on the boxes. The point (8, 8) is 1 and 7.5 pixels from the sides of the first box."""
    student, teacher = random_detector("fcos"), random_detector("fcos", seed=1).eval().requires_grad_(False)
    loss, data = CrossKD(student.spec, teacher.spec, depth=2, box_error="log_iou"), padded_batch(((64, 64),))
    sums = []
    for boxes, divisor in (([[7, 7, 15.5, 15.5]], 1 / 7.5), ([], 1), ([[4, 4, 12, 12], [28, 28, 36, 36]], 2)):
        target = Target(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.ones(len(boxes), dtype=torch.int64)
        )
        images = replace(data, targets=(target,))
        values = loss(student.view(images), teacher.view(images, frozen=True))
        sums.append([values[term].item() * divisor for term in ("heads.classes", "heads.boxes")])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[2] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("fcos", "point_offset", 0.5),
        ("fcos", "point_step", "nominal"),
        ("retinanet", "anchor_delta_weights", (10, 10, 5, 5)),
    ],
)
def test_equal_deltas_of_other_boxes_are_not_compared(family: str, option: str, value: Any) -> None:
    student, teacher = random_detector(family), random_detector(family, **{option: value})
    for loss in (CrossKD, BCKD):
        with pytest.raises(DistillError, match=f"expected equal anchors, but {option} is"):
            loss(student.spec, teacher.spec)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (ADL, {}),
        (BCKD, {"logits": {"boxes": 0}}),
        (CrossKD, {"heads": {"boxes": 0}}),
        (CWD, {"neck": {"all": 0}, "logits": {"classes": 1}}),
        (DIST, {}),
        (FRS, {"neck": {"features": 0}}),
        (Response, {}),
    ],
)
@pytest.mark.parametrize("other", [{"anchor_delta_weights": (10, 10, 5, 5)}, {"box_head": "distribution"}])
def test_class_scores_are_compared_although_boxes_differ(loss: Any, options: Any, other: dict[str, Any]) -> None:
    """Terms on class scores give what they give for a teacher with the same weights and the same kind of boxes."""
    student, same = random_detector("retinanet", box_loss="giou"), random_detector("retinanet", seed=1, box_loss="giou")
    teacher = random_detector("retinanet", seed=1, box_loss="giou", **other)
    classes = {name: value for name, value in same.net.state_dict().items() if "regression" not in name}
    teacher.net.load_state_dict(classes, strict=False)
    images, values = padded_batch(((64, 64),)), []
    for detector in (same, teacher):
        detector.eval().requires_grad_(False)
        views = student.view(images), detector.view(images, frozen=True)
        values.append(loss(student.spec, detector.spec, **options)(*views))
    assert set(values[0]) == set(values[1])
    assert all(values[0].values())
    assert {name: value.item() for name, value in values[1].items()} == pytest.approx(
        {name: value.item() for name, value in values[0].items()}
    )


def test_refusals() -> None:
    dense = spec(two_stage=False)
    with pytest.raises(DistillError, match="which has no tower_features"):
        CrossKD(spec(), dense)
    with pytest.raises(DistillError, match="box_error: expected giou or log_iou"):
        CrossKD(dense, dense, box_error="iou")
    with pytest.raises(DistillError, match="depth: expected a number of convolutions from 0 to 4"):
        CrossKD(dense, dense, depth=5)
    student, teacher = random_view(batch(OBJECTS), dense, 1), random_view(batch(OBJECTS), dense, 2)
    assert student.spec == teacher.spec
