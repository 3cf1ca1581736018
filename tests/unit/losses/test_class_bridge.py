"""A teacher with another class list: pairs of names, summed probabilities, and classes that it does not know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.labels import bridge_classes, describe_bridge, shared_labels, unknown_classes
from distill.losses.heads import ClassMap, kl_divergence
from distill.types import DetectorSpec, DistillError

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


def test_terms_that_need_all_classes_refuse_an_unknown_one() -> None:
    bridge = bridge_classes(TEACHER, STUDENT, {"car": "vehicle"})
    with pytest.raises(DistillError, match=r"no class of the teacher for \['owl'\]"):
        ClassMap("logits", spec(STUDENT), spec(TEACHER, bridge))
