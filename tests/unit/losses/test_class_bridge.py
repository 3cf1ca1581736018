"""A teacher with another class list: pairs of names, summed probabilities, and classes that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from distill.labels import bridge_classes, describe_bridge, shared_labels, unknown_classes
from distill.losses.adl import ADL
from distill.losses.base import DistillLoss
from distill.losses.bckd import BCKD
from distill.losses.crosskd import CrossKD
from distill.losses.cwd import CWD
from distill.losses.dist import DIST
from distill.losses.frs import FRS
from distill.losses.heads import ClassMap, kl_divergence
from distill.losses.response import Response
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view
from helpers.fake_view import spec as fake_spec

TEACHER, STUDENT = ("cat", "car", "truck", "N/A"), ("vehicle", "owl", "cat")


def spec(classes: tuple[str, ...], bridge: dict[str, str] | None = None) -> DetectorSpec:
    outputs = frozenset({"body", "neck", "rois", "roi_logits"})
    own = DetectorSpec("faster_rcnn", outputs, classes, {}, {}, {}, (0, 0, 0), (1, 1, 1), "batch")
    return replace(own, bridge=bridge)


def class_map() -> ClassMap:
    bridge = bridge_classes(TEACHER, STUDENT, {"car": "vehicle", "truck": "vehicle"})
    assert bridge == {"cat": "cat", "car": "vehicle", "truck": "vehicle"}
    return ClassMap("logits", spec(STUDENT), spec(TEACHER, bridge), partial=True)


def test_names_match_by_spelling_by_the_table_and_by_pairs() -> None:
    assert bridge_classes(
        ("airplane", "tv", "potted plant", "dog"), ("aeroplane", "TV_Monitor", "pottedplant"), "auto"
    ) == {
        "airplane": "aeroplane",
        "tv": "TV_Monitor",
        "potted plant": "pottedplant",
    }
    assert bridge_classes(("cat", "dog"), ("cat", "dog"), {"cat": None}) == {"dog": "dog"}
    assert describe_bridge({"a": "x", "b": "x"}, ("x", "y")) == [
        "x: a + b",
        "y: unknown to the teacher; terms on features only",
    ]


def test_a_class_that_was_left_out_counts_as_unknown_in_the_teachers_ap() -> None:
    bridge = bridge_classes(TEACHER, STUDENT, {"cat": None, "car": "vehicle"})
    known = spec(TEACHER, bridge).data_classes
    assert shared_labels(known, STUDENT) == [0, 0, 1, 0, 0]
    assert unknown_classes(known, STUDENT) == ["owl", "cat"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bus": "vehicle"}, r"\['bus'\] is no class of the teacher"),
        ({"car": "van"}, r"\['van'\] is no class of the data"),
        ("always", "expected auto"),
        ({"cat": None}, "none of the teacher's classes"),
    ],
)
def test_a_map_that_leads_nowhere_is_refused(given: dict[str, str | None] | str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        bridge_classes(TEACHER, STUDENT, given)


def test_probabilities_of_several_classes_are_summed() -> None:
    logits = torch.tensor([[0.5, 1.0, 2.0, -1.0, 0.3]])  # background, cat, car, truck, N/A
    merged = class_map().logits(logits)
    powers = logits.exp()[0]
    total = powers[0] + powers[1] + powers[2] + powers[3]
    expected = torch.stack([powers[0], powers[2] + powers[3], torch.tensor(0.0), powers[1]]) / total
    assert torch.allclose(merged.softmax(-1)[0], expected, atol=1e-6)


def test_sigmoids_of_several_classes_are_summed_and_stay_below_one() -> None:
    merged = class_map().dense_logits(torch.tensor([[3.0, -1.0, 0.0, 0.0], [0.0, 5.0, 5.0, 0.0]])).sigmoid()
    one = torch.tensor(-1.0).sigmoid() + 0.5
    assert torch.allclose(merged[0], torch.stack([one, torch.tensor(0.0), torch.tensor(3.0).sigmoid()]), atol=1e-6)
    assert 0.999 < merged[1, 0] < 1


def test_an_unknown_class_takes_no_part() -> None:
    """Neither its column nor its rows have a gradient; the other columns compare as if it did not exist."""
    classes, generator = class_map(), torch.Generator().manual_seed(0)
    student = torch.randn(4, 4, generator=generator, requires_grad=True)
    teacher, labels = torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 3])
    pair = classes.compared(student, classes.logits(teacher), labels)
    values = kl_divergence(*pair, 2.0)
    kept = [0, 1, 3]
    expected = kl_divergence(student.detach()[:, kept], classes.logits(teacher)[:, kept], 2.0)
    assert torch.allclose(values[[0, 1, 3]], expected[[0, 1, 3]], atol=1e-6)
    assert values[2] == 0
    values.sum().backward()
    assert student.grad is not None
    assert student.grad[:, 2].abs().max() == 0
    assert student.grad[2].abs().max() == 0
    assert student.grad[[0, 1, 3]][:, kept].abs().min() > 0


def test_the_teachers_best_class_gives_the_box() -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 2.0, 1.0, 0.0], [0.0] * 5, [0.0] * 5])
    assert class_map().labels(torch.tensor([1, 1, 2, 3]), logits).tolist() == [3, 2, 0, 1]


def test_without_a_bridge_every_class_must_be_known() -> None:
    with pytest.raises(DistillError, match=r"classes\.map=auto"):
        ClassMap("logits", spec(STUDENT), spec(TEACHER))


def dense_spec(classes: tuple[str, ...], bridge: dict[str, str] | None = None) -> DetectorSpec:
    own = fake_spec(classes=classes, two_stage=False, strides=(8, 16, 32, 64, 128))
    return replace(own, bridge=bridge)


def cut_view(view: FakeView, own: DetectorSpec, columns: list[int]) -> FakeView:
    """The same view of a detector that has the classes of these columns alone."""
    count = len(view.spec.classes)
    rows = [anchor * count + column for anchor in range(3) for column in columns]
    logits = {at: x[:, rows] for at, x in view.stages["class_logits"].items()}
    cut = {"class_logits": logits}
    if "head_classes" in view.stages:
        cut["head_classes"] = view.stages["head_classes"][rows]
    return FakeView(view.batch, own, **{**view.stages, **cut})


DENSE_LOSSES: dict[str, Callable[..., DistillLoss]] = {
    "adl": ADL,
    "bckd": partial(BCKD, logits={"classes": 1.0, "boxes": 1.0}),
    "crosskd": partial(CrossKD, depth=0, adapter={"kernel": None}),
    "cwd": partial(CWD, neck={"all": 0}, logits={"classes": 1.0}),
    "dist": DIST,
    "frs": partial(FRS, neck={"features": 0}, logits={"classes": 1.0}),
    "response": Response,
}


@pytest.mark.parametrize("name", DENSE_LOSSES)
def test_dense_terms_compare_the_known_classes_alone(name: str) -> None:
    """A student with an unknown class learns, of the others, what a student without this class learns."""
    bridge = {"cat": "cat", "car": "vehicle"}
    teacher_spec = dense_spec(("cat", "car"), bridge)
    student_spec, smaller = dense_spec(STUDENT), dense_spec(("vehicle", "cat"))
    images = batch([[[3.0, 5.0, 40.0, 30.0]], [[10.0, 8.0, 30.0, 60.0]]])
    student, teacher = random_view(images, student_spec, 1), random_view(images, teacher_spec, 2)
    for view, seed in ((student, 3), (teacher, 4)):
        generator = torch.Generator().manual_seed(seed)
        for branch, outputs in (("classes", 3 * len(view.spec.classes)), ("boxes", 12)):
            view.stages[f"head_{branch}"] = torch.randn(outputs, 6, generator=generator, dtype=torch.float64)
            view.stages[f"tower_{branch}"] = view.stages["neck"]
    logits = student.stages["class_logits"]
    for x in logits.values():
        x.requires_grad_()
    build = DENSE_LOSSES[name]
    values = build(student_spec, teacher_spec).double()(student, teacher)
    expected = build(smaller, teacher_spec).double()(cut_view(student, smaller, [0, 2]), teacher)
    assert values
    for term, value in values.items():
        assert value.item() == pytest.approx(expected[term].item(), rel=1e-9), term
    if name == "crosskd":
        return  # the teacher's head makes the logits
    sum(values.values()).backward()  # type: ignore[union-attr]
    gradients = [x.grad.unflatten(1, (3, 3)) for x in logits.values() if x.grad is not None]
    assert gradients
    assert all(gradient[:, :, 1].abs().max() == 0 for gradient in gradients)
    assert any(gradient[:, :, 0].abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("build", [DIST, Response])
def test_terms_on_regions_give_an_unknown_class_no_gradient(build: Callable[..., DistillLoss]) -> None:
    teacher_spec = replace(fake_spec(classes=("cat", "car")), bridge={"cat": "cat", "car": "vehicle"})
    student_spec = fake_spec(classes=STUDENT)
    images = batch([[[3.0, 5.0, 40.0, 30.0]]])
    student, teacher = random_view(images, student_spec, 1), random_view(images, teacher_spec, 2)
    logits = student.stages["roi_logits"][0].requires_grad_()
    values = build(student_spec, teacher_spec)(student, teacher)
    assert all(0 < value.item() < 100 for value in values.values())
    sum(values.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert logits.grad[:, 2].abs().max() == 0
    assert logits.grad[:, 1].abs().max() > 0


def test_terms_that_need_all_classes_refuse_an_unknown_one() -> None:
    bridge = bridge_classes(TEACHER, STUDENT, {"car": "vehicle"})
    with pytest.raises(DistillError, match=r"no class of the teacher for \['owl'\]"):
        ClassMap("logits", spec(STUDENT), spec(TEACHER, bridge))
