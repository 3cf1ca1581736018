"""Global Knowledge: slow oracles of its terms, its prototypes over an epoch, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses import masks
from distill.losses.base import DistillLoss
from distill.losses.global_knowledge import GlobalKnowledge, agreement, cosines
from distill.types import Batch, DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import OBJECTS, LossGrid
from helpers.loss_states import ALL_TERMS, with_prototypes, with_two_classes
from helpers.slow_oracles import slow_cells, slow_level

NO_ADAPTER = {"kernel": None}


def cosine(a: Tensor, b: Tensor) -> float:
    norms = math.sqrt(sum(x * x for x in a.tolist()) * sum(x * x for x in b.tolist()))
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / norms if norms else 0.0


def pooled(view: FakeView, image: int, box: list[float], stride: int) -> Tensor:
    x = view.neck[stride][image]
    height, width = x.shape[1:]
    x1, y1, x2, y2 = box
    rows = range(min(int(y1 * height / 64), height - 1), min(int(y2 * height / 64), height - 1) + 1)
    columns = range(min(int(x1 * width / 64), width - 1), min(int(x2 * width / 64), width - 1) + 1)
    return torch.stack([x[:, row, column] for row in rows for column in columns]).mean(0)


def bump(place: int, cells: int) -> float:
    return math.exp(-0.5 * ((place - cells / 2) / (cells / 2)) ** 2)


class TestGlobalKnowledge(LossGrid):
    relative = 1e-6  # prototypes are float32
    mask: Mapping[str, Any] = {}
    levels: list[int] | None = None

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        neck = {"levels": self.levels}
        loss = GlobalKnowledge(student, teacher, **ALL_TERMS, neck=neck, mask=self.mask, adapter=NO_ADAPTER)
        return with_prototypes(loss, student, teacher)

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return with_prototypes(GlobalKnowledge(student, teacher, **ALL_TERMS, mask=self.mask), student, teacher)

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        """Positives of the third class, and of the fourth, which has no prototypes."""
        student, teacher = super().pair(images, **options)
        return with_two_classes(student), with_two_classes(teacher)

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        assert isinstance(loss, GlobalKnowledge)
        strides = self.levels or list(student.neck)
        neck = {s: student.neck[s] for s in strides}
        mask = {s: torch.zeros(len(x), *x.shape[2:], dtype=torch.float64) for s, x in neck.items()}
        logits = [view.roi_logits([])[0] for view in (student, teacher)]
        labels_sum, relation_sum, positives, region = 0.0, 0.0, 0, 0
        for image, (boxes, names) in enumerate(zip(student.rois.boxes, student.rois.labels, strict=True)):
            for box, name in zip(boxes.tolist(), names.tolist(), strict=True):
                if name > 0:
                    positives += 1
                    level = slow_level(box, len(strides))
                    stride = strides[level]
                    features = [pooled(view, image, box, stride) for view in (student, teacher)]
                    own = [
                        max(cosine(feature, p) for p in prototypes[name - 1, level])
                        for feature, prototypes in zip(
                            features, (loss.student_prototypes, loss.teacher_prototypes), strict=True
                        )
                    ]
                    rho = 1 - abs(own[0] - own[1])
                    rows, columns, thin = slow_cells(box, stride, *mask[stride].shape[1:])
                    bumps = self.mask.get("kind") == "gaussian" and not thin
                    for y, row in enumerate(rows):
                        for x, column in enumerate(columns):
                            value = rho * (bump(y, len(rows)) * bump(x, len(columns)) if bumps else 1)
                            mask[stride][image, row, column] = max(value, mask[stride][image, row, column].item())
                    p, q = (torch.softmax(model_logits[region] / 2, 0).tolist() for model_logits in logits)
                    kl = sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))
                    labels_sum += rho * 4 * kl / len(p)
                    for k in range(3):
                        for index in range(3):
                            pair = (loss.student_prototypes[k, level, index], loss.teacher_prototypes[k, level, index])
                            a, b = (rho * cosine(f, p) for f, p in zip(features, pair, strict=True))
                            error = abs(a - b)
                            relation_sum += error**2 / 2 if error < 1 else error - 0.5
                region += 1
        terms = {"labels": labels_sum / max(1, positives), "relation": relation_sum / max(1, 9 * positives)}
        for part in ("foreground", "background"):
            levels = []
            for s, inside in mask.items():
                weights = inside if part == "foreground" else (inside == 0).double()
                error = (student.neck[s] - teacher.neck[s]).square().sum(1)
                levels.append((weights * error).sum().item() / max(1.0, 2 * 6 * float(weights.sum())))
            terms[f"neck.{part}"] = sum(levels) / len(levels)
        return terms

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, _ = self.views(OBJECTS)
        loss = GlobalKnowledge(self.student, self.student, **ALL_TERMS, mask=self.mask, adapter=NO_ADAPTER)
        loss.student_prototypes.normal_(generator=torch.Generator().manual_seed(5))
        loss.teacher_prototypes.copy_(loss.student_prototypes)
        for name, value in self.run(
            loss, student, FakeView(student.batch, student.spec, **student.mapped(torch.clone).stages)
        ).items():
            assert value.item() == pytest.approx(0, abs=1e-12), name


class TestGlobalKnowledgeUnderBumps(TestGlobalKnowledge):
    mask: Mapping[str, Any] = {"kind": "gaussian"}


@pytest.mark.parametrize("levels", [[8], [16, 4]])
def test_prototypes_and_proposals_keep_to_the_chosen_levels(levels: list[int]) -> None:
    grid = TestGlobalKnowledge()
    grid.levels = sorted(levels)
    grid.test_equals_its_oracle(OBJECTS)
    loss = GlobalKnowledge(spec(), spec(), neck={"levels": levels})
    assert (loss.levels, loss.student_prototypes.shape[1]) == (sorted(levels), len(levels))


@pytest.mark.parametrize("kind", masks.KINDS)
def test_the_neck_takes_any_mask_and_the_other_terms_none(kind: str) -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    loss, plain = (
        with_prototypes(GlobalKnowledge(spec(), spec(), **ALL_TERMS, mask=mask, adapter=NO_ADAPTER), spec(), spec())
        for mask in ({"kind": kind}, {})
    )
    values, usual = loss(student, teacher), plain(student, teacher)
    assert (values["neck.foreground"] == usual["neck.foreground"]) == (kind == "ground_truth")
    assert all(values[term] == usual[term] for term in ("labels", "relation"))
    if kind == "none":
        errors = [float((x - teacher.neck[s]).square().mean()) / 2 for s, x in student.neck.items()]
        assert values["neck.foreground"].item() == pytest.approx(sum(errors) / len(errors))
        assert "neck.background" not in values


def test_logits_of_a_wrong_shape_are_refused() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    scores, deltas = teacher.stages["roi_logits"]
    teacher.stages["roi_logits"] = scores[:, :-1], deltas
    with pytest.raises(
        DistillError, match=r"labels, logits of regions \(R, K\+1\): expected student and teacher of equal shape"
    ):
        GlobalKnowledge(spec(), spec(), adapter=NO_ADAPTER)(student, teacher)


def test_without_prototypes_every_region_counts_in_full() -> None:
    student, teacher = (random_view(batch(OBJECTS), spec(), seed) for seed in (1, 2))
    loss = GlobalKnowledge(spec(), spec(), adapter=NO_ADAPTER)
    positive = [boxes[names > 0] for boxes, names in zip(student.rois.boxes, student.rois.labels, strict=True)]
    grid = {s: (x.shape[2], x.shape[3]) for s, x in student.neck.items()}
    inside = masks.ground_truth(positive, grid)
    expected = 0.0
    for s, x in student.neck.items():
        total = (inside[s] * (x - teacher.neck[s]).square().sum(1)).sum()
        expected += float(total / (12 * inside[s].sum()).clamp(min=1)) / 5
    assert loss(student, teacher)["neck.foreground"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.weights == {"neck.foreground": 1, "neck.background": 4, "labels": 1}


def test_only_neck_and_relation_fade() -> None:
    loss = GlobalKnowledge(spec(), spec(), **ALL_TERMS)
    assert {term: loss.factor(term, 0.75, 24) for term in loss.weights} == {
        "neck.foreground": 0.25,
        "neck.background": 0.25,
        "labels": 1.0,
        "relation": 0.25,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"temperature": 0}}, "labels.temperature"),
        ({"prototypes": {"count": 0}}, "prototypes: expected count"),
        ({"prototypes": {"atoms": 3}}, "prototypes: unknown option 'atoms'"),
        ({"neck": {"levels": [128]}}, "neck.levels"),
        ({"prototypes": {"quantile": 2}}, "quantile from 0 to 1"),
        ({"prototypes": {"count": 2.5}}, "expected count and images of 1 or more"),
        ({"prototypes": {"bandwidth": 0}}, "bandwidth above 0"),
        ({"mask": {"scale": 0}}, "mask.scale"),
        ({"mask": {"kind": "round"}}, "mask.kind: expected one of ground_truth"),
        (
            {"mask": {"kind": "gaussian"}, "neck": {"foreground": 0, "background": 0}},
            "mask: it is for neck, but no term",
        ),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        GlobalKnowledge(spec(), spec(), **options)


def test_without_weights_it_is_nothing_for_any_pair() -> None:
    nothing = {"neck": {"foreground": 0, "background": 0}, "labels": {"weight": 0}}
    loss = GlobalKnowledge(spec(), spec(two_stage=False), **nothing)
    loss.on_epoch_start(1, None, None, None)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert loss(random_view(batch(OBJECTS), spec(), 1), random_view(batch(OBJECTS), spec(), 2)) == {}


def test_opposite_places_are_not_trusted_at_all() -> None:
    assert agreement(torch.tensor([[0.9, -1.0]]), torch.tensor([[-0.8, -0.9]])).item() == 0


def test_it_needs_regions() -> None:
    with pytest.raises(DistillError, match="the teacher is a retinanet, which has no rois"):
        GlobalKnowledge(spec(), spec(two_stage=False))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_region_without_signal_has_a_bounded_gradient(scale: float) -> None:
    """The other regions keep the plain cosine, at any scale of the features."""
    torch.manual_seed(0)
    features, prototypes = scale * torch.randn(3, 8), scale * torch.randn(4, 8)
    features[1] *= 1e-12
    features.requires_grad_()
    values = cosines(features, prototypes)
    plain = torch.nn.functional.cosine_similarity(features[:, None], prototypes, dim=-1, eps=0.0)
    assert torch.allclose(values[[0, 2]], plain[[0, 2]], rtol=1e-6, atol=1e-7)
    values.sum().backward()
    assert features.grad is not None
    typical = torch.linalg.vector_norm(prototypes, dim=-1).mean()
    assert torch.linalg.vector_norm(features.grad[1]) <= 4 / (0.999e-3 * typical)
